"""Times the native CPU kernels against torch's dense bfloat16 product of the same shape.

    python -m benchmarks.cpu [--threads N] [--formats 8-4096-0 ...] [--shapes 4096x4096 ...] [--tokens 1 4 ...]

Prints a table and writes ``benchmarks/results/cpu-DATE.json``. A format is v-k-r, r = 0 without a residual book. Each
instruction set is measured in a process of its own, with torch held to the same one. Times are the least of many runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch

from vllm_vptq import cpu
from vllm_vptq.layouts import compact
from vllm_vptq.parameters import ModuleShard, Segment

RESULTS = Path(__file__).parent / "results"
FORMATS = ["8-256-0", "8-4096-0", "6-4096-0", "8-256-256", "12-4096-4096", "8-65536-0", "8-65536-256"]
FORMATS += ["8-65536-65536", "16-65536-256", "16-65536-65536"]
SHAPES = ["4096x4096", "14336x4096"]
TOKENS = [1, 2, 4, 8, 16, 64, 512]
TORCH = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "avx512": {}}
SECONDS = 0.3
"""Spent on each measurement, and at least three runs."""


def main() -> None:
    """Measures one instruction set after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure_all(arguments)
        return
    rows = []
    print(
        f"{'format':>16} {'out x in':>12} {'tokens':>6} {'set':>7} {'us':>9} {'torch us':>9} {'ratio':>6}", flush=True
    )
    for name in set_names():
        environment = {
            **os.environ,
            **TORCH[name],
            cpu.INSTRUCTION_SET: name,
            "OMP_NUM_THREADS": str(arguments.threads),
        }
        command = [sys.executable, "-m", "benchmarks.cpu", "--worker", *sys.argv[1:]]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout
            for line in worker.stdout:
                row = json.loads(line)
                rows.append(row)
                print(
                    f"{row['format']:>16} {row['shape']:>12} {row['tokens']:>6} {row['isa']:>7} {row['us']:>9.0f} "
                    f"{row['torch_us']:>9.0f} {row['ratio']:>6.2f}",
                    flush=True,
                )
        if worker.returncode:
            sys.exit(worker.returncode)
    save(arguments.threads, rows)


def set_names() -> list[str]:
    """The instruction sets of this processor that torch can be held to."""
    return [name for name in cpu.INSTRUCTION_SETS[: cpu.instruction_set() + 1] if name in TORCH]


def measure_all(arguments: argparse.Namespace) -> None:
    """Prints one row of JSON after the other."""
    for shape in arguments.shapes:
        out, columns = map(int, shape.split("x"))
        weight = torch.randn(out, columns).bfloat16()
        inputs = {count: torch.randn(count, columns).bfloat16() for count in arguments.tokens}
        dense = {count: microseconds(partial(torch.nn.functional.linear, x, weight)) for count, x in inputs.items()}
        for name in arguments.formats:
            layer = random_layer(name, out, columns)
            for count, x in inputs.items():
                us = microseconds(partial(cpu.linear, x, *layer.tensors().values(), None, layer.plan))
                row = {"format": name, "shape": shape, "tokens": count, "isa": os.environ[cpu.INSTRUCTION_SET]}
                row |= {"us": round(us, 1), "torch_us": round(dense[count], 1), "ratio": round(us / dense[count], 3)}
                print(json.dumps(row), flush=True)


def random_layer(name: str, out: int, columns: int) -> compact.CompactLayout:
    """A bfloat16 layer of one module with a column norm, as the published ones have it, and random indices."""
    v, k, r = map(int, name.split("-"))
    bits, res_bits = (k - 1).bit_length(), (r - 1).bit_length() if r else 0
    rows = -(-out // v)
    words = torch.randint(-(1 << 31), 1 << 31, (rows, -(-columns * (bits + res_bits) // 32))).to(torch.int32)
    residual = torch.randn(r, v) if r else None
    segment = Segment(v, bits, res_bits, columns, 0, words, None, torch.randn(k, v), residual)
    shard = ModuleShard(out, columns, (segment,), torch.rand(columns) + 0.5, torch.rand(columns), 0)
    return compact.build([shard], torch.bfloat16, torch.device("cpu"))


def microseconds(function: Callable[[], object]) -> float:
    """The least of the runs that fit into SECONDS."""
    function()
    best, runs, end = float("inf"), 0, time.perf_counter() + SECONDS
    while runs < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        function()
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return best * 1e6


def save(threads: int, rows: list[dict]) -> None:
    """Writes today's file; a run with other threads adds its rows."""
    path = RESULTS / f"cpu-{date.today()}.json"
    head = {"date": str(date.today()), "cpu": processor(), "torch": torch.__version__, "rows": []}
    results = json.loads(path.read_text()) if path.exists() else head
    kept = [row for row in results["rows"] if row["threads"] != threads]
    results["rows"] = kept + [{"threads": threads, **row} for row in rows]
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in results.pop("rows"))
    path.write_text(json.dumps(results, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')


def processor() -> str:
    """The name the processor gives itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
