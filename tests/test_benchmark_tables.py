"""The tables that go into the documents, and what is kept of measurements."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import counters, memory, quality, record, serving_tables
from benchmarks.limits import Limits, Work
from benchmarks.shapes import SHAPES
from benchmarks.synthesize import synthesize
from tests.tiny import ROOT


@pytest.mark.parametrize("format_name", ["v8-k256-256", "v6-k4096-0", "v12-k4096-4096", "v8-k65536-0"])
def test_the_compact_layout_takes_what_the_checkpoint_does(tmp_path, format_name):
    synthesize(tmp_path / "out", "tiny", format_name)
    compact = memory.weights(SHAPES["tiny"], format_name)["compact"]
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert compact == pytest.approx(size, rel=0.02)


def test_benchmarks_are_run_as_modules():
    """By path their folder would come first, and transformers take ``kernels.py`` for the package of that name."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.py")]
    assert len(files) > 20
    assert not [file.name for file in files if "python benchmarks/" in file.read_text(encoding="utf8")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_calls_to_be_counted_without_a_gpu_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["counters"])
    with pytest.raises(SystemExit) as ended:
        counters.main()
    assert ended.value.code == 1 and capsys.readouterr().err == "error: no GPU\n"


@pytest.mark.skipif(importlib.util.find_spec("llmcompressor") is not None, reason="it is not missing here")
def test_scalar_quantization_without_its_package_is_one_line():
    words = [
        sys.executable,
        "-m",
        "benchmarks.scalar",
        "absent",
        "absent",
        "--method",
        "rtn",
        "--bits",
        "2",
        "--group",
        "96",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: no llmcompressor"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_figures_that_were_measured_on_a_gpu():
    """GiB on an H200, of models synthesized without norms."""
    results = json.loads((ROOT / "benchmarks" / "results" / "serving-2026-11-22-h200.json").read_text())
    held = {row["format"]: row["weight_gib"] for row in results["models"]}
    shape = SHAPES["Llama-3.1-8B"]
    for name in ("v8-k65536-0", "v8-k256-256"):
        assert memory.weights(shape, name)["stationary"] / 2**30 == pytest.approx(held[name], rel=0.005)
    assert memory.rivals(shape)["16 bits"] / 2**30 == pytest.approx(held["float16"], rel=0.001)


def test_ranks_take_what_the_document_says_and_what_two_gpus_held():
    text = (ROOT / "docs" / "tensor-parallel.md").read_text()
    for model in ("Llama-3.1-70B", "Qwen2.5-72B", "Mistral-Large-2407"):
        assert memory.table(f" {model} ", {f"tp {tp}": (model, tp) for tp in (1, 2, 4, 8)}) in text
    results = json.loads((ROOT / "benchmarks" / "results" / "serving-2026-11-29-h200-x2.json").read_text())
    held = {(row["model"], row["format"]): row["weight_gib"] for row in results["models"] if row["tp"] == 2}
    for model, name, format_name in (
        ("70b-v8-k65536-0", "Llama-3.1-70B", "v8-k65536-0"),
        ("8b-v8-k65536-0", "Llama-3.1-8B", "v8-k65536-0"),
        ("8b-v8-k256-256", "Llama-3.1-8B", "v8-k256-256"),
    ):
        computed = memory.weights(SHAPES[name], format_name, 2)["stationary"] / 2**30
        assert computed == pytest.approx(held[model, format_name], rel=0.005)


def test_two_cards_have_the_figures_of_their_file():
    text = (ROOT / "docs" / "tensor-parallel.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "serving-2026-11-29-h200-x2.json").read_text())
    rows = [row for row in results["rows"] if row["tp"] == 2]
    dense = {(row["shape"], row["batch"]): row["tokens_per_s"] for row in rows if row["kind"] == "dense"}
    assert len(rows) == 22
    for row in rows:
        times = row["tokens_per_s"] / dense[row["shape"], row["batch"]]
        words = f"{row['tokens_per_s']:,.0f}" + (f" ({times:.2f}x)" if row["kind"] != "dense" else " |")
        assert words in text, row


def test_four_cards_have_the_figures_of_their_file():
    folder = ROOT / "benchmarks" / "results"
    results = json.loads((folder / "serving-2026-11-30-h200-x4.json").read_text())
    one = json.loads((folder / "serving-2026-11-29-h200.json").read_text())
    speeds = {
        (row["tp"], row["batch"]): row["tokens_per_s"]
        for row in one["rows"] + results["rows"]
        if row["model"] == "70b-v8-k65536-0" and row["layout"] == "stationary"
    }
    text = (ROOT / "docs" / "tensor-parallel.md").read_text()
    cells = " | ".join(f"{speeds[4, batch]:,.0f}" for batch in (1, 8, 32))
    assert f"| v8-k65536 | 4 | | | | {cells} |" in text
    times = [f"{speeds[4, batch] / speeds[1, batch]:.2f} times" for batch in (1, 8, 32)]
    assert all(words in text for words in times), times
    assert f"{results['models'][0]['first_token_ms']:.0f} ms" in text


def test_a_70b_model_in_2_bits_is_what_it_promises():
    assert memory.weights(SHAPES["Llama-3.1-70B"], "v8-k65536")["compact"] <= 22e9


def test_room_for_the_kv_cache():
    shape = SHAPES["Llama-3.1-8B"]
    assert memory.room(shape, 15_000_000_000, 24.0) == 6_600_000_000 // (32 * 8 * 128 * 2 * 2)
    assert memory.room(shape, 30_000_000_000, 24.0) == 0
    lines = memory.rooms("Llama-3.1-8B", 24.0).splitlines()
    assert "| 16 bits | 15.0 GiB | 42,266 |" in lines
    assert "| v8-k65536, compact or aligned | 3.8 GiB | 133,582 (3.2x) |" in lines


MODEL = {"model": "m", "shape": "48 layers of 5120", "format": "float16", "kind": "dense", "dtype": "float16",
         "layout": None, "tp": 1, "weight_gib": 27.5, "load_s": 1.0, "first_token_ms": 50.0}  # fmt: skip
CODED = MODEL | {"model": "v", "format": "v8-k256-256", "kind": "vptq", "layout": "stationary", "weight_gib": 6.0,
                 "load_s": 11.6, "first_token_ms": 60.0}  # fmt: skip


OTHER_RUN = "serving-2026-11-29-h200-14b.json"


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md", "docs/kernels.md"])
def test_documents_give_the_figures_of_the_results_they_link(document):
    """All formats of the file that is linked first; those of the other run that it lacks."""
    text = (ROOT / document).read_text()
    assert re.search(r"results/(serving-[\w-]+\.json)", text)[1] == "serving-2026-11-29-h200.json"
    _figures_are_in(text, "serving-2026-11-29-h200.json", None)
    assert f"results/{OTHER_RUN}" in text
    for format_name in ("v8-k65536-256", "v12-k4096-4096")[: 1 if document == "README.md" else 2]:
        _figures_are_in(text, OTHER_RUN, format_name)


def test_the_table_of_qwen_gives_the_figures_of_one_run():
    results = json.loads((ROOT / "benchmarks" / "results" / OTHER_RUN).read_text())
    text = (ROOT / "docs" / "serving.md").read_text().partition("| tokens/s, one sequence | A2")[2].partition("\n\n")
    assert f"results/{OTHER_RUN}" in text[2].partition("\n\n")[0]
    lines = {line.split("|")[1].strip().removeprefix("VPTQ "): line for line in text[0].splitlines()[2:]}
    names = {"float16": "fp16", "w4a16-g128": "4-bit, compressed-tensors, groups of 128"}
    models = {row["model"]: row for row in results["models"] if row["shape"] == "48 layers of 5120"}
    speeds = {(row["model"], row["batch"]): row["tokens_per_s"] for row in results["rows"]}
    assert len(models) == 7
    for name, model in models.items():
        cells = [cell.strip(" *") for cell in lines[names.get(model["format"], model["format"])].split("|")[3:-1]]
        pairs = [
            *((f"{speeds[name, n]:,.0f}", speeds[name, n] / speeds["14b-dense", n]) for n in (1, 8)),
            (f"{model['first_token_ms']:.0f} ms", model["first_token_ms"] / models["14b-dense"]["first_token_ms"]),
        ]
        words = [word if model["kind"] == "dense" else f"{word} ({times:.2f}x)" for word, times in pairs]
        assert cells == [*words[:2], f"{model['weight_gib']:.1f}", words[2]], name


def _figures_are_in(text: str, name: str, format_name: str | None) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    rows = [
        row for row in results["rows"]
        if (row["shape"], row["dtype"], row["tp"]) == ("32 layers of 4096", "float16", 1)
        and row["layout"] in (None, "stationary") and row["batch"] in (1, 8, 32, 64)
    ]  # fmt: skip
    dense = {row["batch"]: row["tokens_per_s"] for row in rows if row["kind"] == "dense"}
    chosen = [row for row in rows if format_name in (None, row["format"])]
    assert chosen
    for row in chosen:
        words = f"{row['tokens_per_s']:,.0f}"
        if row["kind"] != "dense":
            words += f" ({row['tokens_per_s'] / dense[row['batch']]:.2f}x)"
        assert words in text, (row["format"], row["batch"], words)


@pytest.mark.parametrize(
    ("files", "norm", "dtype", "heading"),
    [
        (["h200", "h200-images"], False, "float16", "| format | bits a weight, resident | 1 token"),
        (["h200", "h200-images"], True, "float16", "| format | 1 token | 8 | 16 | 32 | 64 | 128 | 1024"),
        (["h200"], False, "bfloat16", "| format | 1 token | 8 | 16 | 64 | 1024"),
        (["h200-bytes"], True, "float16", "| two books of bytes | 1 token | 8 | 32 | 64"),
    ],
)
def test_tables_of_kernels_give_geometric_means_of_the_rows(files, norm, dtype, heading):
    rows = _kernel_rows(files, norm, dtype).values()
    table = (ROOT / "docs" / "kernels.md").read_text().partition(heading)
    assert table[2]
    head, _, *lines = (table[1] + table[2]).partition("\n\n")[0].splitlines()
    columns = [cell.strip().removesuffix(" token") for cell in head.split("|")]
    assert len(lines) == len({row["format"] for row in rows})
    for line in lines:
        cells = dict(zip(columns, line.split("|"), strict=True))
        name = line.split("|")[1].strip()
        for tokens in filter(str.isdigit, columns):
            own = [r for r in rows if (r["format"], r["tokens"]) == (name, int(tokens))]
            assert len(own) == 8
            mean = math.exp(sum(math.log(r["dense_us"] / r["us"]) for r in own) / len(own))
            assert f"{mean:.2f}" in cells[tokens], (name, tokens, mean)
            goal = re.search(r"\((.*)\)", cells[tokens])
            assert ("**" in cells[tokens]) == bool(goal and f"{mean:.2f}" >= f"{float(goal[1]):.2f}"), (name, tokens)


def test_the_table_of_bandwidths_gives_those_of_the_rows():
    rows = _kernel_rows(["h200", "h200-images"], False, "float16")
    text = (ROOT / "docs" / "kernels.md").read_text().partition("| | 8B gate_up: 1 token | 8 | 64 |")[2]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.partition("\n\n")[0].splitlines()[2:]]
    assert {line[0] for line in lines} == {name for name, *_ in rows}
    for name, *cells in lines:
        own = [rows[name, layer, tokens] for layer in ("8B gate_up", "70B down") for tokens in (1, 8, 64)]
        assert cells == [f"{row['memory_percent']:.0f} / {row['gather_percent']:.0f}" for row in own], name


def _kernel_rows(files: list[str], norm: bool, dtype: str) -> dict[tuple[str, str, int], dict]:
    """Stationary rows by format, layer and tokens, each of the last file that has it."""
    kept = {}
    for file in files:
        results = json.loads((ROOT / "benchmarks" / "results" / f"kernels-2026-11-29-{file}.json").read_text())
        kept |= {
            (r["format"], r["layer"], r["tokens"]): r
            for r in results["rows"]
            if (r["norm"], r["dtype"], r["layout"]) == (norm, dtype, "stationary")
        }
    return kept


def test_the_table_of_crossovers_gives_geometric_means_of_the_rows():
    rows = json.loads((ROOT / "benchmarks" / "results" / "crossovers-2026-11-29-h200.json").read_text())["rows"]
    calls = {(row["format"], row["layer"], row["tokens"]): row for row in rows}
    text = (ROOT / "docs" / "kernels.md").read_text().partition("| class | measured on")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]]
    assert {line[0] for line in lines} == {row["format"] for row in rows}
    for name, _, *cells in lines:
        for tokens, cell in zip((128, 256, 384), cells, strict=True):
            assert calls[name, "8B o", tokens]["direct"] >= tokens
            speedups = []
            for layer in {row["layer"] for row in rows}:
                looked_up, many = calls[name, layer, tokens], calls[name, layer, 1024]
                dense = looked_up["dense_us"]
                speedups.append((dense / looked_up["us"], dense / (dense + many["us"] - many["dense_us"])))
            means = [statistics.geometric_mean(column) for column in zip(*speedups, strict=True)]
            assert cell == " / ".join(f"{mean:.2f}" for mean in means), (name, tokens)


LISTS = "counters-2026-11-29-h200-lists.json"


def test_the_table_of_counters_gives_those_of_its_files():
    folder = ROOT / "benchmarks" / "results"
    rows = json.loads((folder / "counters-2026-11-29-h200.json").read_text())["rows"]
    rows += [row for row in json.loads((folder / LISTS).read_text())["rows"] if row["format"] == "v6-k4096"]
    text = (ROOT / "docs" / "kernels.md").read_text().partition("| one token, with a norm |")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    cells = {line[0]: line[1:] for line in lines}
    assert len(rows) == 7 and len(cells) == len(lines) == 16

    def counted(name: str, form: str, over: str | float = 1.0) -> list[str]:
        counters = [row["counters"] for row in rows]
        return [form.format(c[name] / (c[over] if isinstance(over, str) else over)) for c in counters]

    pipe, look_ups = "l1tex__data_pipe_lsu_wavefronts", "smsp__inst_executed_op_ldsm.sum"
    percent = "{:.0f}"
    assert cells["whole call, µs (dense)"] == [f"{row['us']:.1f} ({row['dense_us']:.1f})" for row in rows]
    for name, wanted in {
        "`wide_kernel` alone, profiled, µs": counted("gpu__time_duration.sum", "{:.1f}", 1e3),
        "blocks, on 132 multiprocessors": counted("launch__grid_size", percent),
        "thousand cycles in which a multiprocessor works, mean": counted("sm__cycles_active.avg", "{:.1f}", 1e3),
        "thousand look-ups of 32 rows (`ldmatrix`)": counted(look_ups, percent, 1e3),
        "wavefronts of shared memory and L1 a look-up": counted(f"{pipe}.sum", "{:.1f}", look_ups),
        "... of these bank conflicts": counted(
            "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "{:.1f}", look_ups
        ),
        "% of cycles with a wavefront": counted(f"{pipe}.avg.pct_of_peak_sustained_active", percent),
        "% of issue slots": counted("sm__issue_active.avg.pct_of_peak_sustained_active", percent),
        "% of tensor cores": counted("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", percent),
        "% of memory, over the whole time": counted("dram__throughput.avg.pct_of_peak_sustained_elapsed", percent),
    }.items():
        assert cells[name] == wanted, name
    for reason in ("short_scoreboard", "long_scoreboard", "wait", "barrier", "gmma"):
        (line,) = (line for line in lines if f"(`{reason}`)" in line[0])
        assert line[1:] == [f"{row['stalls_percent'][reason]:.0f}" for row in rows]


def test_the_table_of_lists_gives_the_counters_of_its_file():
    rows = json.loads((ROOT / "benchmarks" / "results" / LISTS).read_text())["rows"]
    text = (ROOT / "docs" / "kernels.md").read_text().partition("| lists, with a norm |")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    lists = [row for row in rows if row["kernel"] == "multiply_kernel"]
    assert len(lines) == len(lists) == 11
    pipe = "l1tex__data_pipe_lsu_wavefronts"
    percents = (
        f"{pipe}.avg.pct_of_peak_sustained_active",
        "sm__issue_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    )
    for line, row in zip(lines, lists, strict=True):
        counted, stalls, tokens = row["counters"], row["stalls_percent"], row["tokens"]
        v, *books = map(int, re.findall(r"\d+", row["format"]))
        look_ups = row["outputs"] * row["inputs"] / 8 * len(books) / 32  # of 32 rows of 16 bytes
        activations = tokens // 8 * look_ups / (v // 8)  # looked up once for both planes of a vector
        wanted = [f"{row['format']}, {row['outputs']} × {row['inputs']}", str(tokens)]
        wanted += [f"{counted[name] / 1e3:.1f}" for name in ("gpu__time_duration.sum", "sm__cycles_active.avg")]
        for name in ("sm__cycles_active", pipe, "l1tex__data_bank_conflicts_pipe_lsu_mem_shared"):
            wanted.append(f"{counted[f'{name}.sum'] / look_ups:.1f}")
        wanted.append(f"{counted['smsp__inst_executed_op_ldsm.sum'] / (look_ups + activations):.2f}")
        wanted += [f"{counted[name]:.0f}" for name in percents]
        wanted += [f"{stalls[reason]:.0f}" for reason in ("short_scoreboard", "long_scoreboard", "wait", "barrier")]
        assert line == wanted


def test_serving_tables_says_how_it_is_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serving_tables", "--help"])
    with pytest.raises(SystemExit) as ended:
        serving_tables.main()
    assert not ended.value.code and "RESULTS.json" in capsys.readouterr().out


def test_serving_tables():
    rows = [MODEL | {"batch": 1, "tokens_per_s": 100.0}, CODED | {"batch": 1, "tokens_per_s": 150.0}]
    rooms = [MODEL | {"card_gb": 24.0, "kv_cache_tokens": 1000}, CODED | {"card_gb": 24.0, "kv_cache_tokens": 5000}]
    results = {"gpu": "NVIDIA H200", "models": [MODEL, CODED], "rows": rows, "rooms": rooms}
    lines = serving_tables.tables(results).splitlines()
    assert "| v8-k256-256, `stationary` | 1 | 6.0 | 12 s | 60 ms (1.20x) | 150 (1.50x) |" in lines
    assert "| float16 | 1 | 27.5 |  | 50 ms | 100 |" in lines
    assert "| VPTQ v8-k256-256 | 5.2 (reference implementation) | 150 |" in lines
    assert "| VPTQ v8-k65536-0 | 3.8 (reference implementation) | not measured yet |" in lines
    assert "| Ollama (llama.cpp) q5_0 | 14.3 | |" in lines and "| float16 | | 100 |" in lines
    assert "| v8-k256-256, `stationary` | 6.0 GiB | 5,000 tokens (5.00x) |" in lines


H200 = SimpleNamespace(
    name="NVIDIA H200", memory_clock_rate=3201000, memory_bus_width=6144, clock_rate=1980000, multi_processor_count=132
)


@pytest.mark.parametrize(
    ("fields", "nbytes", "look_ups"),
    [
        ((8, 65536, 0, [8192], 28672, 1), 8192 * 28672 / 4 + 2 * (65536 * 8 + 8192 + 28672), 8192 * 28672 / 8),
        ((8, 65536, 256, [64, 16], 512, 3), 80 * 512 * 3 / 8 + 2 * (2 * 65792 * 8 + 3 * 592), 10 * 512 * 2),
        ((12, 4096, 4096, [25], 512, 1), 3 * 512 * 3 + 2 * (8192 * 12 + 537), 3 * 512 * 2 * 2),
        ((6, 4096, 0, [24], 512, 1), 4 * 512 * 1.5 + 2 * (4096 * 6 + 536), 4 * 512),
    ],
)
def test_the_least_work_of_a_call(fields, nbytes, look_ups):
    assert Work.of(*fields) == Work(nbytes, look_ups)


def test_shares_of_the_limits_of_an_h200():
    limits = Limits.of(H200)
    assert limits.nbytes == pytest.approx(4.917e6, rel=1e-3)
    assert limits.look_ups == pytest.approx(2.091e6, rel=1e-3)
    # 70B down at one token: 59 MB of indices and 29 M vectors in 58 us.
    assert limits.percent(Work.of(8, 65536, 0, [8192], 28672, 1), 57.97) == {
        "memory_percent": 21.0,
        "gather_percent": 24.2,
    }


def test_results_of_several_runs_are_kept_in_one_file(tmp_path):
    assert record.path("kernels", "2026-11-24", "NVIDIA H100 80GB HBM3").name == "kernels-2026-11-24-h100.json"
    file, about = tmp_path / "kernels.json", {"gpu": "NVIDIA H200"}
    record.add(file, about, [{"tokens": 1, "us": 5.0}, {"tokens": 2, "us": 6.0}], ("tokens",))
    record.add(file, about, [{"tokens": 2, "us": 4.0}, {"tokens": 3, "us": 7.0}], ("tokens",))
    kept = json.loads(file.read_text())
    assert kept == about | {"rows": [{"tokens": t, "us": us} for t, us in ((1, 5.0), (2, 4.0), (3, 7.0))]}


def test_quality_tables():
    """By bits, and beside the paper's row for the same text at the same bits where there is one."""
    row = {"model": "m", "text": "t", "context": 8, "tokens": 80, "original_perplexity": 2.0, "quantize_s": 3.4}
    row |= {"name": "paper:2", "method": "paper", "effective_bits": 2.01, "perplexity": 4.0, "excess": 0.6931}
    row |= {"divergence": 0.7}
    best = row | {"name": "best:2", "method": "best", "effective_bits": 1.99, "perplexity": 2.6, "excess": 0.2624}
    fine = best | {"name": "best:3", "effective_bits": 3.0}
    other = best | {"text": "u"}
    lines = quality.table([fine, row, best, other]).splitlines()
    assert lines[2:4] == [
        "| paper:2 | 2.010 | 4.00 | 0.693 |  | 0.700 | 3 |",
        "| best:2 | 1.990 | 2.60 | 0.262 | 62 % | 0.700 | 3 |",
    ]
    assert [line.split("|")[5].strip() for line in lines[4:]] == ["", ""]
