"""Where the time of a decoding step goes in vLLM: every kernel's share, and one layer's kernels in their order.

    python -m benchmarks.step DIR                      # VPTQ, dense or 4-bit, one or eight sequences
    python -m benchmarks.step DIR --batch 1 --layout aligned

The engine runs in this process, with CUDA graphs, as torch's profiler has to be there. Milliseconds a step are measured
without the profiler, as ``vllm-vptq bench`` does, and what the profiler sees is beside them: it can slow a step down.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import record, trace
from vllm_vptq import compat
from vllm_vptq.bench import checkout, worker
from vllm_vptq.bench.settings import BenchError, Contestant, Settings
from vllm_vptq.doctor import machine
from vllm_vptq.format import VPTQFormatError
from vllm_vptq.inspection.headers import read_config
from vllm_vptq.layouts import choice

PROFILED_STEPS = 32
KEY = ("model", "layout", "pdl", "batch")
METHOD = (
    "ms_per_step: without profiler, the median time of generating all steps less that of a sixteenth of them, over the "
    "difference of the counts. All else from torch's profiler, CUDA graphs on, mean of the middle half of the steps by "
    "their length: own time is what no kernel begun earlier covers, idle_us is when nothing runs, both add up to "
    "profiled_us. layer: the layer of median span; late_us is its begin after the end of all before it. pdl: whether "
    "kernels that torch compiled start while those before them drain (TORCHINDUCTOR_ENABLE_PDL)"
)
LEAST = 0.002
"""Of a step: kernels below share a line of the table."""


def contestant(folder: Path) -> Contestant:
    """The model in ``folder``, of whichever kind its config.json says."""
    section = read_config(folder).get("quantization_config") or {}
    if section.get("quant_method") == "compressed-tensors":
        return Contestant.find(folder, "w4a16")
    return Contestant.find(folder, "vptq" if section else "dense")


def overlaps(model: Contestant) -> bool:
    """Whether compiled kernels start while those before them drain: the plugin wants it where nothing is set."""
    setting = os.environ.get(compat.OVERLAP)
    return model.kind == "vptq" and compat.overlaps_by_default() if setting is None else setting == "1"


def layer_count(folder: Path) -> int:
    """Decoder layers."""
    config = read_config(folder)
    return int((config.get("text_config") or config)["num_hidden_layers"])


def profile(engine: worker.Engine, batch: int, settings: Settings) -> list[dict[str, Any]]:
    """The ``traceEvents`` of generating ``PROFILED_STEPS`` tokens."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        engine.seconds(batch, settings.input_tokens, PROFILED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    return events


def summary(events: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """What a row says of a trace; TraceError if no steps are to be found in it."""
    steps = trace.middle(trace.steps(trace.kernels(events), layers))
    totals = trace.totals(steps)
    one = trace.layer(steps, layers)
    return {
        "profiled_us": totals["us"],
        "profiled_steps": len(steps),
        "idle_us": totals["idle_us"],
        "kernels": totals["kernels"],
        "layer_us": round(trace.span(one), 2),
        "layer": trace.sequence(one),
    }


def show(row: dict[str, Any], console: Console) -> None:
    """A step's kernels by kind, and a layer's in their order."""
    title = f"{row['model']}, batch {row['batch']}: {row['ms_per_step']:.3f} ms a step"
    console.print(f"\n{escape(title)} ({row['profiled_us'] / 1e3:.3f} under the profiler)", style="bold")
    us, kinds = row["profiled_us"], Counter[str]()
    for kernel in row["kernels"]:
        kinds[kernel["kind"]] += kernel["us"]
    table = _table("kernels", "calls a step", "us a step", "share")
    for name in trace.KINDS:
        of_kind = [kernel for kernel in row["kernels"] if kernel["kind"] == name]
        if not of_kind:
            continue
        table.add_row(name, "", f"{kinds[name]:.1f}", f"{kinds[name] / us:.1%}", style="bold")
        named = [kernel for kernel in of_kind if kernel["share"] >= LEAST]
        for kernel in named:
            table.add_row(
                f"  {kernel['name']}", f"{kernel['calls']:g}", f"{kernel['us']:.1f}", f"{kernel['share']:.1%}"
            )
        if rest := [kernel for kernel in of_kind if kernel["share"] < LEAST]:
            calls, own = sum(kernel["calls"] for kernel in rest), sum(kernel["us"] for kernel in rest)
            table.add_row(f"  {len(rest)} smaller", f"{calls:g}", f"{own:.1f}", f"{own / us:.1%}")
    table.add_row("nothing runs", "", f"{row['idle_us']:.1f}", f"{row['idle_us'] / us:.1%}", style="bold")
    console.print(table)
    console.print(f"\none layer, {row['layer_us']:.1f} us (late: after the end of all before it)", style="dim")
    table = _table("kernel", "blocks", "begins us", "lasts us", "late us", "own us")
    for kernel in row["layer"]:
        times = (f"{kernel[name]:.2f}" for name in ("begins_us", "lasts_us", "late_us", "own_us"))
        table.add_row(kernel["name"], kernel["grid"], *times)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("kernels", "kernel", "blocks") else "right", overflow="fold")
    return table


def run(folder: Path, settings: Settings, out: Path | None, console: Console) -> None:
    """Measures, prints and writes. BenchError, VPTQFormatError or TraceError if it cannot."""
    model, layers = contestant(folder), layer_count(folder)
    if model.layout not in (None, *choice.CHOICES):
        raise BenchError(f"layout {model.layout}: expected one of {', '.join(choice.CHOICES)}")
    smi = machine.nvidia_smi()
    if not machine.gpus():
        raise BenchError("a step is profiled on a GPU, and torch sees none here (vllm-vptq doctor says why)")
    engine = worker.Engine(str(folder), model.load_format, settings)
    rows, commit = [], checkout.commit() or "unknown"
    for event in worker.measure(settings, engine.seconds):
        batch = event["batch"]
        row = {
            "model": model.name,
            "format": model.format,
            "shape": model.shape,
            "dtype": str(engine.config.model_config.dtype).removeprefix("torch."),
            "layout": model.layout,
            "pdl": overlaps(model),
            "batch": batch,
            "ms_per_step": event["ms_per_step"],
            "spread": event["spread"],
            "commit": commit,
        }
        rows.append(row | summary(profile(engine, batch, settings), layers))
        show(rows[-1], console)
    today = str(date.today())
    file = out or record.path("step", today, engine.device)
    about = {
        "date": today,
        "gpu": engine.device,
        "driver": smi[0][1] if smi else None,
        "versions": engine.versions,
        "method": METHOD,
    }
    record.add(file, about, rows, KEY)
    console.print(f"\nwritten to {escape(str(file))}", style="dim")


def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The model; of rivals only config.json is read.")],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences decoded at once (1 and 8).")] = None,
    layout: Annotated[str | None, typer.Option(help=f"{', '.join(choice.CHOICES)}; overrules {choice.LAYOUT}.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON to write or add to (benchmarks/results/step-DATE-GPU.json).")
    ] = None,
    utilization: Annotated[
        float, typer.Option(help="vLLM's gpu_memory_utilization.")
    ] = Settings.gpu_memory_utilization,
) -> None:
    """Prints where the time of a decoding step goes in vLLM, and writes it as JSON."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where the profiler is
    if layout is not None:
        os.environ[choice.LAYOUT] = layout
    batches = tuple(sorted(set(batch or (1, 8))))
    settings = Settings(batches=batches, prompt_tokens=0, gpu_memory_utilization=utilization)
    try:
        run(folder, settings, out, Console(highlight=False))
    except (BenchError, VPTQFormatError, trace.TraceError) as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
