"""Tables of quality in docs/quantizing.md and quantizing-experiments.md: every row says what a row of a file does.

Where a row may come from is read from its section. The paragraph before a table links its files; if it links none, all
count that the section linked before. A row whose name ends in a mark is of the file that is linked after this mark, one
without of a file without; `paper`, which others are beside, may be in either where a row's own files have none.
Which evaluation it is, its tokens and the original's perplexity, says the last paragraph of the section that has both
("40,920 tokens ... perplexity is 24.46"). Bits, perplexity, the method, if the row names one, and whether it says "rows
coupled" or "rows not coupled" then tell which row of the files it is. One that says neither is of the preset as it was,
whose rows are coupled in `best` since 2026-11-30.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

import pytest

from tests.tiny import ROOT

GUIDE, EXPERIMENTS = "docs/quantizing.md", "docs/quantizing-experiments.md"
TEXTS = {page: (ROOT / page).read_text(encoding="utf8") for page in (GUIDE, EXPERIMENTS)}
MARKS = "†‡§¶"
LINK = re.compile(rf"([{MARKS}])|\(\.\./benchmarks/results/(quality-[\w.-]+\.json)\)")
EVALUATION = re.compile(r"([\d,]+)\stokens.*?perplexity\s(?:there\s)?is\s(\d+\.\d+)", re.DOTALL)
METHODS = {"`fast`": "fast", "`balanced`": "balanced", "`best`": "best", "`paper`": "paper",
           "`gptvq-like`": "gptvq-like", "GPTQ": "gptq", "round to nearest": "rtn"}  # fmt: skip
# What a column says of a row of results, and of the rows of `paper` on the same text.
COLUMNS = {
    "effective bits": lambda row, papers: row["effective_bits"],
    "perplexity": lambda row, papers: row["perplexity"],
    "times the original's": lambda row, papers: row["perplexity"] / row["original_perplexity"],
    "excess": lambda row, papers: _excess(row),
    "less than `paper`": lambda row, papers: _less(row, _paper_for(row, papers)),
    "at equal bits": lambda row, papers: _less(row, _paper_between(row, papers)),
    "KL": lambda row, papers: row["divergence"],
    "CPU seconds": lambda row, papers: row.get("quantize_cpu_s", math.nan),
}
# Cells of the guide that no file keeps, by the names of their rows.
UNKEPT = {
    ("GPTQ, 2 bits", "15,000 to 23,000"): "of five runs, of which one was kept",
    ("GPTQ, 2 bits", "6.4 to 6.8"): "of the same runs",
}


def _coupled(row: dict) -> bool:
    return bool(row["recipe"].get("curvature"))


@pytest.mark.parametrize(("page", "least"), [(GUIDE, 90), (EXPERIMENTS, 20)])
def test_every_row_is_one_of_the_files(page, least):
    rows = list(_rows(page))
    assert len(rows) > least
    problems = [
        f"{page}:{place}: {name}: {problem}"
        for place, name, cells, results in rows
        if (problem := _problem(name, cells, results))
    ]
    assert not problems, "\n".join(problems)
    unkept = UNKEPT.keys() & {(name, cell) for _, name, cells, _ in rows for cell in cells.values()}
    assert unkept == (UNKEPT.keys() if page == GUIDE else set())


def test_the_table_of_corrections():
    """Its rows are on the held-out text, its columns the shares in their recipes."""
    before, heading, rest = TEXTS[EXPERIMENTS].partition("| `fast` | effective bits | KL with no correction | half |")
    results = [row for _, row in _linked(before.rstrip().rpartition("\n\n")[2]) if row["text"] == "held-out.txt"]
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    assert heading and len(lines) == 4
    for line in lines:
        name, bits, *cells = _cells(line)
        for share, cell in zip((0, 0.5, 0.75, 1), cells, strict=True):
            found = [
                row["divergence"] for row in results
                if name.lower().startswith(row["model"]) and _says(bits, row["effective_bits"])
                and row["recipe"].get("correction", 0) == share
                and ("tokens" in row["recipe"]) == ("131,072 calibration tokens" in name)
            ]  # fmt: skip
            assert [_says(cell, value) for value in found] == [True] * bool(cell), (line, share, found)


@pytest.mark.parametrize(
    ("words", "now", "count"),
    [
        ("What this brought", lambda row: row["file"].endswith("-anew.json"), 12),
        ("With more tokens, one run each", lambda row: row["file"].endswith("-tokens.json") and not _coupled(row), 8),
        ("Rows of `balanced` and `best` without rows coupled", _coupled, 10),
        ("With the present targets, training and tokens, `best`", _coupled, 6),
        ("What the stream is worth to `fast`", lambda row: "-30-" in row["file"], 4),
        (
            "Before and now, with more calibration tokens",
            lambda row: "-30-" in row["file"] and not _coupled(row),
            10,
        ),
        ("stories15m has `balanced` with 32,768 tokens", lambda row: row["file"].endswith("-anew.json"), 2),
    ],
    ids=["allocation", "tokens", "coupled rows of before", "coupled rows", "stream", "more tokens", "tokens of now"],
)
def test_tables_of_before_and_now(words, now, count):
    """Excess and KL before and now, of rows of the same text, are in the files that the paragraph links."""
    paragraph, heading, rest = TEXTS[EXPERIMENTS].partition(words)[2].partition("\n\n| | 2 bits | 2.25 |")
    assert heading and "\n\n" not in paragraph
    rows = [row for _, row in _linked(paragraph)]
    same = ("model", "method", "context", "tokens")
    head, _, *lines = rest.partition("\n\n")[0].splitlines()
    columns = [2, 2.25, *map(float, re.findall(r"[\d.]+", head))]
    assert len(lines) == count
    for line in lines:
        name, *cells = _cells(line)
        *model, preset, column = name.split(", ")
        for bits, cell in zip(columns, cells, strict=True):
            if not cell:
                continue
            rows_there = [
                row for row in rows
                if row.get("method") == METHODS[preset] and row["model"].startswith("".join(model).lower())
                and row["recipe"]["bits"] == bits
            ]  # fmt: skip
            (after,) = filter(now, rows_there)
            earlier = [
                row for row in rows_there
                if not now(row) and not _coupled(row) and all(row[key] == after[key] for key in same)
                and math.isclose(row["original_perplexity"], after["original_perplexity"], rel_tol=1e-4)
            ]  # fmt: skip
            said_before, said_after = cell.split(" -> ")
            assert _says(said_after, COLUMNS[column](after, [])), (line, bits)
            assert any(_says(said_before, COLUMNS[column](row, [])) for row in earlier), (line, bits)


def test_the_table_of_training():
    """Its rows are those of the files that the paragraph before links, by what their names say."""
    paragraph, heading, rest = TEXTS[EXPERIMENTS].partition("stories15m with the present targets")[2].partition("\n\n|")
    assert heading and "\n\n" not in paragraph
    results = [row for _, row in _linked(paragraph)]
    head, _, *lines = rest.partition("\n\n")[0].splitlines()
    columns = [*map(float, re.findall(r"[\d.]+", head))]
    assert len(lines) == 12 and len(columns) == 5
    for line in lines:
        name, *cells = _cells(line)
        preset, way, column = name.split(", ")
        for bits, cell in zip(columns, cells, strict=True):
            start = f"{METHODS[preset]}:{bits:g}"
            (row,) = (
                row for row in results
                if (row["name"] == start if way == "as it is" else row["name"].startswith(f"{start}, {way}"))
            )  # fmt: skip
            assert _says(cell, COLUMNS[column](row, [])), (line, bits)


def _rows(page: str) -> Iterator[tuple[int, str, dict[str, str], list[tuple[str, dict]]]]:
    """Of every row of a page's tables its line, its name, its other cells, and the results that it may be."""
    place, before, own, evaluation = 1, [], [], None
    for block in TEXTS[page].split("\n\n"):
        head, *lines = block.splitlines()
        if head.startswith("#"):
            before, own, evaluation = [], [], None
        elif not head.startswith("|"):
            own = _linked(block)
            before += own
            evaluation = EVALUATION.search(block) or evaluation
        elif "| effective bits | perplexity |" in head:
            assert evaluation, f"{page}:{place}: of how many tokens, and what is the original's perplexity?"
            results = [
                (mark, row) for mark, row in own or before
                if _says(evaluation[1], row["tokens"] // row["context"] * (row["context"] - 1))
                and _says(evaluation[2], row["original_perplexity"])
            ]  # fmt: skip
            for below, line in enumerate(lines[1:], 2):
                (_, name), *cells = zip(_cells(head), _cells(line), strict=True)
                yield place + below, name, dict(cells), results
        place += block.count("\n") + 2


def _linked(paragraph: str) -> list[tuple[str, dict]]:
    """The rows of the files that a paragraph links, with the mark before the link."""
    rows, mark = [], ""
    for found in LINK.finditer(paragraph):
        mark = found[1] or mark
        if found[2]:
            results = json.loads((ROOT / "benchmarks" / "results" / found[2]).read_text())
            rows += [(mark, row | {"file": found[2]}) for row in results["rows"]]
    return rows


def _problem(name: str, cells: dict[str, str], results: list[tuple[str, dict]]) -> str:
    """What keeps a row from being one of the results, nothing if it is one."""
    cells = {column: cell for column, cell in cells.items() if cell and (name, cell) not in UNKEPT}
    asked = cells.pop("bits asked", None)
    mark = name[-1] if name[-1] in MARKS else ""
    methods = {None, *(method for words, method in METHODS.items() if words in name)}
    papers = [(own, row) for own, row in results if row.get("method") == "paper"]
    papers = [row for own, row in papers if own == mark] or [row for _, row in papers]
    problem = f"bits, perplexity and method are none of {sorted({row['file'] for own, row in results if own == mark})}"
    for own, row in results:
        if own != mark or (methods != {None} and row.get("method") not in methods):
            continue
        if asked and float(asked) != row["recipe"]["bits"]:
            continue
        if not _coupled_as(name, row):
            continue
        values = {column: COLUMNS[column](row, papers) for column in cells}
        wrong = {column: value for column, value in values.items() if not _says(cells[column], value)}
        if not wrong:
            return ""
        if not wrong.keys() & {"effective bits", "perplexity"}:
            problem = f"{row['file']} has {wrong}"
    return problem


def _coupled_as(name: str, row: dict) -> bool:
    """Whether a result couples output rows as a table's name says; if it says nothing, as the preset does."""
    if "rows not coupled" in name:
        return not _coupled(row)
    if "rows coupled" in name:
        return _coupled(row)
    return "curvature" not in row["name"] and "rows coupled" not in row["name"]


def _cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.split("|")[1:-1]]


def _says(cell: str, value: float) -> bool:
    """Whether a cell is the value, rounded to its digits; halves either way."""
    figure = re.fullmatch(r"(-?[\d,]+(?:\.(\d+))?)(?: %|x)?", cell)
    return figure is not None and abs(float(figure[1].replace(",", "")) - value) <= 0.5001 * 10 ** -len(figure[2] or "")


def _excess(row: dict) -> float:
    return math.log(row["perplexity"] / row["original_perplexity"])


def _less(row: dict, excess: float) -> float:
    return 100 * (1 - _excess(row) / excess)


def _paper_for(row: dict, papers: list[dict]) -> float:
    """The excess of `paper` for the same bits asked or, where none was asked for those, the nearest effective bits."""
    asked = [paper for paper in papers if paper["recipe"]["bits"] == row["recipe"].get("bits")]
    nearest = min(asked or papers, key=lambda paper: abs(paper["effective_bits"] - row["effective_bits"]), default=None)
    return _excess(nearest) if nearest else math.nan


def _paper_between(row: dict, papers: list[dict]) -> float:
    """The excess of `paper` at the row's effective bits: its logarithm along a line through two rows about it."""
    points = sorted((paper["effective_bits"], math.log(_excess(paper))) for paper in papers)
    at = min(max(sum(bits <= row["effective_bits"] for bits, _ in points), 1), len(points) - 1)
    (left, low), (right, high) = points[at - 1 : at + 1]
    return math.exp(low + (high - low) * (row["effective_bits"] - left) / (right - left))
