"""Training end to end in several ways, from a model whose layers are coded once: what rate, tokens and steps do.

    python -m benchmarks.training MODEL TEXT --preset balanced --bits 2 --calibration FILE --way 0 --way 100 \\
        --way 100:512:0.0015 --way 100:4096:0.005

A way is ``STEPS[:TOKENS[:RATE]]``, tokens a step and the first step's rate by default as the preset has them. Each is
scored as by ``quality.py`` and is a row of its results; seconds are those of the training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.quality import RESULTS, result, save
from quantize.parts import Parts
from quantize.pipeline import code_model, finish_model
from quantize.recipe import Finetuning, Recipe
from quantize.report import Report


def main() -> None:
    """Codes the model, then trains and scores it in each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="a file, or wikitext2")
    parser.add_argument("--preset", required=True)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--recipe", type=Path, help="YAML; it wins over the preset")
    parser.add_argument("--way", action="append", required=True, metavar="STEPS[:TOKENS[:RATE]]")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--results", type=Path, default=RESULTS)
    words = parser.parse_args()
    recipe = Recipe.load(words.recipe, words.preset, bits=words.bits, calibration=words.calibration)
    ways = [way(text, recipe.finetune) for text in words.way]
    with tempfile.TemporaryDirectory() as folder, Report(Console(highlight=False, width=120)) as report:
        coded = Path(folder) / "coded"
        run, plan, versions = code_model(words.model, coded, recipe, report)
        for text, training in zip(words.way, ways, strict=True):
            out = Path(folder) / "trained"
            shutil.copytree(coded, out)
            parts = Parts(out, json.loads((out / "parts" / "run.json").read_text()))
            variant = replace(run, recipe=recipe.model_copy(update={"finetune": training}), parts=parts)
            started, cpu_started = time.perf_counter(), time.process_time()
            finish_model(variant, plan, out, versions)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            name = f"{words.preset}:{words.bits:g}, training {text}"
            save(result(out, words, name, words.preset, seconds, cpu_seconds), words.results)
            shutil.rmtree(out)


def way(text: str, default: Finetuning) -> Finetuning:
    """``STEPS[:TOKENS[:RATE]]``, what is missing as in the default."""
    steps, *more = text.split(":")
    tokens = int(more[0]) if more else default.tokens
    return Finetuning(steps=int(steps), tokens=tokens, rate=float(more[1]) if len(more) > 1 else default.rate)


if __name__ == "__main__":
    main()
