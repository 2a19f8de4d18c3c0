"""Many rows of quality.py, several at a time on one GPU, which a small model does not fill.

    python -m benchmarks.quality_sweep MODEL TEXT --calibration FILE --row best:2.25 --row paper:2 --workers 6

A row is ``PRESET:BITS``, with options of the recipe as JSON behind another colon if there are any:
``'best:2.25:{"finetune": {"steps": 100}}'``. Rows are begun in the order given, each is written as soon as it is done,
and those that the results hold already are left out: a sweep that was killed goes on when it is called again. Seconds
are those on a GPU that the workers share.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.quality import RESULTS, result, results_path, save
from quantize.pipeline import quantize_model
from quantize.recipe import Recipe
from quantize.report import Report


def main() -> None:
    """Runs the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="a file, or wikitext2")
    parser.add_argument("--row", action="append", required=True, help="PRESET:BITS[:JSON]")
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = results_path(arguments.results, Path(arguments.model).name)
    known = {row["name"] for row in json.loads(path.read_text())["rows"]} if path.exists() else set()
    rows = [row for row in arguments.row if row not in known]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.workers)))
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(run, row, arguments) for row in rows]:
            done.result()


def run(row: str, arguments: argparse.Namespace) -> None:
    """Quantizes and scores one row; a row that fails says why and leaves the others alone."""
    preset, bits, *options = row.split(":", 2)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        update = json.loads(options[0]) if options else {}
        update = {"calibration": arguments.calibration} | update
        recipe = Recipe.load(None, preset, bits=float(bits), **update)
        with tempfile.TemporaryDirectory() as folder:
            out, logs = Path(folder) / "vptq", arguments.results / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            log = logs / f"{Path(arguments.model).name}-{preset}-{bits}-{zlib.crc32(row.encode()):08x}.txt"
            started, before = time.perf_counter(), time.process_time()
            with log.open("w", buffering=1) as file, Report(Console(file=file, highlight=False, width=120)) as report:
                quantize_model(arguments.model, out, recipe, report)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - before
            save(result(out, arguments, row, preset, seconds, cpu_seconds), arguments.results)
    except Exception:
        print(f"{row} failed:\n{traceback.format_exc()}", flush=True)
    finally:
        torch.cuda.empty_cache()  # the others share the GPU


if __name__ == "__main__":
    main()
