"""What quantizing costs: perplexity before and after, and divergence, as one row of a dated JSON file.

    python -m benchmarks.quality MODEL TEXT [--context 1024] [--tokens 40960] [vptq-quantize run options ...]

Writes ``benchmarks/results/quality-DATE-MODEL.json`` with the machine, the versions and the recipe; a second run on the
same day adds its row. ``--table`` prints the rows of such files as a Markdown table. Many rows at once on a GPU:
``quality_sweep.py``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from quantize.evaluate import Score, evaluation_text, load_any, score
from quantize.export import read_config
from quantize.plan import total_bits
from quantize.report import REPORT, seconds_by_step

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs one comparison, or prints those that were run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?", help="a file, or wikitext2")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--name", help="of the row, where the options do not say it")
    parser.add_argument("--table", nargs="+", type=Path, help="result files to print")
    arguments, options = parser.parse_known_args()
    if arguments.table:
        print(table([row for path in arguments.table for row in json.loads(path.read_text())["rows"]]))
        return
    if not arguments.model or not arguments.text:
        parser.error("MODEL and TEXT are needed")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "vptq"
        started = time.perf_counter()
        command = [sys.executable, "-m", "quantize.cli", "run", arguments.model, "--out", str(out), *options]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        name = arguments.name or " ".join(o for o in options if not Path(o).is_file() and o != "--calibration")
        method = options[options.index("--preset") + 1] if "--preset" in options else "default"
        save(result(out, arguments, name, method, seconds, cpu_seconds), RESULTS)


def result(
    out: Path, arguments: argparse.Namespace, name: str, method: str, seconds: float, cpu_seconds: float
) -> dict:
    """The row of a checkpoint that was made of ``arguments.model``."""
    original, quantized = compare(arguments.model, out, arguments)
    bits = total_bits(dict(read_config(out)[1]))
    recipe = json.loads((out / "vptq_recipe.json").read_text())
    records = [json.loads(line) for line in (out / REPORT).read_text().splitlines()]
    errors = [record["error"] for record in records if "layer" in record]
    sources = [Path(source).name for source in recipe.get("calibration", ["self"])]
    return {
        "name": name,
        "method": method,
        "model": Path(arguments.model).name,
        "text": Path(arguments.text).name,
        "context": arguments.context,
        "tokens": arguments.tokens,
        "recipe": recipe | {"calibration": sources},
        "effective_bits": round(bits, 4),
        "perplexity": round(quantized.perplexity, 4),
        "original_perplexity": round(original.perplexity, 4),
        "excess": round(math.log(quantized.perplexity / original.perplexity), 4),
        "divergence": round(quantized.divergence or 0.0, 4),
        "mean_layer_error": round(sum(errors) / len(errors), 6),
        "quantize_s": round(seconds, 1),
        "quantize_cpu_s": round(cpu_seconds, 1),
        "step_s": {step: round(spent, 1) for step, spent in seconds_by_step(records).items()},
        "load": round(os.getloadavg()[2], 1),
    }


def compare(model: str, out: Path, arguments: argparse.Namespace) -> tuple[Score, Score]:
    """Scores in float32 of the original and of what was made of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = evaluation_text(arguments.text)
    (original, tokenizer), (quantized, _) = load_any(model, device), load_any(str(out), device)
    size = (arguments.context, arguments.tokens)
    return score(original, tokenizer, text, *size), score(quantized, tokenizer, text, *size, reference=original)


def save(row: dict, folder: Path) -> None:
    """Adds a row to today's file for the model, whole or not at all whoever else writes, and prints it."""
    path = results_path(folder, row["model"])
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    head = {
        "machine": f"{machine}, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-vptq")},
        "rows": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = json.loads(path.read_text()) if path.exists() else head
        results["rows"].append(row)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(results, indent=2) + "\n")
        fresh.replace(path)
    print(json.dumps(row, indent=2), flush=True)


def results_path(folder: Path, model: str) -> Path:
    """Today's file for a model."""
    return folder / f"quality-{date.today()}-{model}.json"


def table(rows: list[dict]) -> str:
    """Rows as Markdown, by bits: excess is the logarithm of the perplexities' ratio.

    How much less than ``paper`` is said where there is such a row for the same text, within a twentieth of a bit.
    """
    papers = [row for row in rows if row.get("method") == "paper"]
    lines = [
        "| | effective bits | perplexity | excess | less than `paper` | KL | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (_same_text(row), round(row["effective_bits"], 1))):
        near = [
            paper
            for paper in papers
            if _same_text(paper) == _same_text(row) and abs(paper["effective_bits"] - row["effective_bits"]) < 0.05
        ]
        less = f"{1 - row['excess'] / near[-1]['excess']:.0%}".replace("%", " %") if near and row not in near else ""
        excess = math.log(row["perplexity"] / row["original_perplexity"])
        values = [row["name"], f"{row['effective_bits']:.3f}", f"{row['perplexity']:.2f}", f"{excess:.3f}", less]
        lines.append("| " + " | ".join([*values, f"{row['divergence']:.3f}", f"{row['quantize_s']:.0f}"]) + " |")
    return "\n".join(lines)


def _same_text(row: dict) -> tuple:
    """What rows must share to be compared."""
    return row["model"], row["text"], row["context"], row["tokens"], row["original_perplexity"]


if __name__ == "__main__":
    main()
