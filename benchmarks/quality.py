"""Perplexity of a model before and after quantizing, as one row of a dated JSON file.

    python benchmarks/quality.py MODEL TEXT [--calibration FILE] [vptq-quantize options ...]

Writes ``benchmarks/results/quality-DATE-MODEL.json`` with the machine, the versions and the recipe; a second run on the
same day adds its row.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from quantize.evaluate import evaluation_text, load_any, perplexity
from quantize.export import read_config
from quantize.pipeline import Plan

RESULTS = Path(__file__).parent / "results"
CONTEXT, TOKENS = 1024, 40960


def main() -> None:
    """Runs one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="a file, or wikitext2")
    arguments, options = parser.parse_known_args()
    text = evaluation_text(arguments.text)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "vptq"
        started = time.perf_counter()
        command = [sys.executable, "-m", "quantize.cli", "run", arguments.model, "--out", str(out), *options]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        original, quantized = (measure(model, text) for model in (arguments.model, str(out)))
        plan = Plan(read_config(out)[1])
        recipe = json.loads((out / "vptq_recipe.json").read_text())
    row = {
        "model": Path(arguments.model).name,
        "text": Path(arguments.text).name,
        "recipe": recipe | {"calibration": Path(c).name if (c := recipe.get("calibration")) else "self-written"},
        "effective_bits": round(plan.bits, 4),
        "perplexity": round(quantized, 4),
        "original_perplexity": round(original, 4),
        "ratio": round(quantized / original, 4),
        "quantize_s": round(seconds, 1),
    }
    save(row)


def measure(model: str, text: str) -> float:
    """Perplexity in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return perplexity(*load_any(model, device), text, CONTEXT, TOKENS)


def save(row: dict) -> None:
    """Adds a row to today's file for the model and prints it."""
    path = RESULTS / f"quality-{date.today()}-{row['model']}.json"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    head = {
        "machine": f"{machine}, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-vptq")},
        "context": CONTEXT,
        "tokens": TOKENS,
        "rows": [],
    }
    results = json.loads(path.read_text()) if path.exists() else head
    results["rows"].append(row)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
