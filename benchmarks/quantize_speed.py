"""What quantizing takes: one block of a known model, with random weights and activations, through the real pipeline.

    python -m benchmarks.quantize_speed --shape Llama-3.1-8B --format v8-k65536 --preset fast
    python -m benchmarks.quantize_speed --shape Llama-3.1-70B --bits 2.25 --tokens 32768 --context 2048 --check

Weights are Gaussian with columns of different size and one weight in ten thousand eight times as large; activations
start from embeddings with few common directions and a few large channels. Times hardly depend on them; errors are those
of this data and of no model. A table of seconds by step, peak memory and the time of all the model's blocks follows,
which is this block's times their number: reading the model, calibration text and writing the checkpoint are not in it.
Results go to ``benchmarks/results/quantize-DATE-DEVICE.json``.

``--check`` codes the block a second time and compares bit for bit, and compares a small layer with the CPU's result.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.shapes import SHAPES, Shape
from quantize import native
from quantize.blocks import quantize_block
from quantize.calibration import sequences, wanted_tokens
from quantize.devices import be_deterministic, choose_devices, forget_peaks, peak_host_memory, total_peak
from quantize.drift import Original
from quantize.estimate import planned
from quantize.model import decoder_blocks, first_inputs
from quantize.parts import Parts
from quantize.plan import Plan
from quantize.recipe import PRESETS, Recipe
from quantize.report import Report, seconds_by_step
from quantize.run import Run
from quantize.solver import solve
from vllm_vptq.format import LayerSpec

RESULTS = Path(__file__).parent / "results"
CHECK_BOUND = 0.03
"""By how much, relatively, the error of a small layer may differ between a GPU and the CPU: sums round differently, and
a vector that lies between two centroids may go either way."""
_VOCABULARY = 32768
_GIB = 2.0**30


class Progress(Report):
    """Prints every layer with its seconds by step, at once: a run that is cut off has said what it knew."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts, self._started = parts, time.perf_counter()

    def layer(self, name: str, spec: LayerSpec, error: float, done: int, total: int) -> None:
        """A layer is coded."""
        record = self._parts.record(name)
        steps = "  ".join(f"{step} {seconds:.2f}" for step, seconds in record["step_seconds"].items())
        short = name.split(".", 3)[-1]
        print(
            f"{time.perf_counter() - self._started:7.1f} s  {short:<18} {spec.shape[0]}x{spec.shape[1]} "
            f"error {error:.3e} in {record['seconds']:.2f} s: {steps}; peak {record['peak_mib'] / 1024:.1f} GiB",
            flush=True,
        )


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.1-8B")
    parser.add_argument(
        "--format", default="v8-k65536", help="vVECTOR-kCENTROIDS[-RESIDUAL], where no --bits are given"
    )
    parser.add_argument("--bits", type=float)
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    parser.add_argument("--tokens", type=int, help="of calibration [what the preset takes for layers so wide]")
    parser.add_argument("--context", type=int, help="tokens in a sequence [256]")
    parser.add_argument("--rounds", type=int, help="refinements [the preset's]")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    measure(parser.parse_args())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the results."""
    recipe, shape = chosen_recipe(arguments), SHAPES[arguments.shape]
    be_deterministic()
    devices = choose_devices(recipe.device)
    started = time.perf_counter()
    for device in devices:
        warm_up(device)
    print(f"compiled and warm after {time.perf_counter() - started:.1f} s: {describe(devices)}", flush=True)
    checks: dict[str, Any] = {}
    if arguments.check:
        checks["cpu"] = compare_with_cpu(devices[0])
        print(f"check: a small layer against the CPU: {checks['cpu']}", flush=True)
    model = random_model(shape, devices[0])
    plan = planned(model, recipe)
    ids = random_ids(recipe, plan.widest, len(model.get_input_embeddings().weight))
    print(
        f"{arguments.shape}: {plan.weights / 1e6:.0f}M weights in a block, {plan.bits:.3f} effective bits, "
        f"{ids.numel():,} calibration tokens",
        flush=True,
    )
    row, tensors = coded_block(model, plan, recipe, ids, devices, shape)
    if arguments.check:
        _, again = coded_block(model, plan, recipe, ids, devices, shape)
        same = tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)
        checks["twice"] = "the same bits" if same else "DIFFERENT BITS"
        print(f"check: the block a second time: {checks['twice']}", flush=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("results", "check")}
    row = {
        **settings,
        "tokens": ids.numel(),
        "machine": describe(devices),
        "versions": versions(),
        **row,
        "checks": checks,
    }
    save(row, arguments.results, devices[0])
    if "DIFFERENT BITS" in checks.values() or checks.get("cpu", {}).get("within") is False:
        sys.exit("a check failed")
    return row


def chosen_recipe(arguments: argparse.Namespace) -> Recipe:
    """The preset's recipe for a given text, as long as need be, without training: that is measured elsewhere."""
    options: dict[str, Any] = {"calibration": "text", "finetune": {"steps": 0}, "device": arguments.device}
    options |= {"tokens": arguments.tokens, "context": arguments.context, "rounds": arguments.rounds}
    if arguments.bits is None:
        parsed = re.fullmatch(r"v(\d+)-k(\d+)(?:-(\d+))?", arguments.format)
        if parsed is None:
            sys.exit(f"--format {arguments.format}: expected something like v8-k65536 or v8-k65536-256")
        v, k, r = (int(number or 0) for number in parsed.groups())
        options |= {"vector_length": v, "centroids": k, "residual_centroids": r}
    else:
        options |= {"bits": arguments.bits, "allocation": "uniform"}
    return Recipe.load(None, arguments.preset, **options)


def warm_up(device: torch.device) -> None:
    """Builds what is compiled at first use, and starts the libraries of the device."""
    if not native.available(device):
        print("no compiled search: torch does it all")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator).to(device)
    solve(weight, torch.eye(256, device=device), Recipe(), Recipe(rounds=1, iterations=2), torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_with_cpu(device: torch.device) -> dict[str, Any]:
    """The errors of a small layer, coded on the device and on the CPU, with one book and with two."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 64, generator=generator) @ torch.randn(64, 512, generator=generator)
    x += 0.5 * torch.randn(2000, 512, generator=generator)
    weight, moment = torch.randn(512, 512, generator=generator), x.T @ x / 2000
    found: dict[str, Any] = {"within": True, "bound": CHECK_BOUND}
    for name, sizes in {"v8-k1024": (8, 1024, 0), "v4-k256-64": (4, 256, 64)}.items():
        recipe = Recipe(**dict(zip(("vector_length", "centroids", "residual_centroids"), sizes, strict=True)), rounds=2)
        errors = [
            solve(weight.to(place), moment.to(place), recipe, recipe, torch.bfloat16).error
            for place in (device, torch.device("cpu"))
        ]
        found[name] = [round(error, 6) for error in errors]
        found["within"] &= abs(errors[0] / errors[1] - 1) <= CHECK_BOUND
    return found


@torch.no_grad()
def random_model(shape: Shape, device: torch.device) -> nn.Module:
    """A model of one block on the host, in bfloat16, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shape.cut(1).config("bfloat16")
    vocabulary = min(_VOCABULARY, config["vocab_size"])
    config = AutoConfig.for_model(**config | {"vocab_size": vocabulary})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for linear in next(iter(decoder_blocks(model))).linears.values():
            weight = (
                torch.randn_like(linear.weight) * (0.3 * torch.randn_like(linear.weight[0]).float()).exp().bfloat16()
            )
            weight *= torch.where(torch.rand_like(weight) < 1e-4, 8, 1)
            linear.weight.copy_(0.02 * weight)
        embedding = model.get_input_embeddings().weight
        rank = embedding.shape[1] // 8
        common = torch.randn(len(embedding), rank, device=device) @ torch.randn(rank, embedding.shape[1], device=device)
        channels = (0.5 * torch.randn(embedding.shape[1], device=device)).exp()
        channels[:4] *= 30
        embedding.copy_((common / rank**0.5 + 0.3 * torch.randn_like(embedding)) * channels * 0.02)
    return model.cpu().eval()


def random_ids(recipe: Recipe, widest: int, vocabulary: int) -> Tensor:
    """Calibration tokens int64 ``[sequences, context]``, as many as a run takes."""
    generator = torch.Generator().manual_seed(2)
    count = sequences(recipe, wanted_tokens(recipe, widest))
    return torch.randint(vocabulary, (count, recipe.context), generator=generator)


def coded_block(
    model: nn.Module, plan: Plan, recipe: Recipe, ids: Tensor, devices: list[torch.device], shape: Shape
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The row of one block that is coded, and all its tensors."""
    device = devices[0]
    on_gpu = device.type == "cuda"
    for each in devices if on_gpu else []:
        torch.cuda.empty_cache()
        forget_peaks(each)
    before = host_memory()
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder) / "out", {})
        here = ids.to(device)
        run = Run(model, None, decoder_blocks(model), recipe, parts, Progress(parts), here, here, devices)
        batches = first_inputs(model, run.blocks, run.block_batches())
        reference = Original(batches) if recipe.drifts else None
        started = time.perf_counter()
        seconds = quantize_block(run, plan, 0, batches, None, reference)
        total = time.perf_counter() - started
        records = [parts.record(name) for name in plan.specs]
        tensors = {f"{name}.{key}": value for name in plan.specs for key, value in parts.load(name).items()}
    in_layers = seconds.pop("layers")
    by_step = {
        **seconds,
        **seconds_by_step(records),
        "saving": max(0.0, in_layers * len(devices) - sum(r["seconds"] for r in records)),
    }
    gpu: dict[str, float] = {}
    if on_gpu:
        held, reserved = (max(peaks) for peaks in zip(*map(total_peak, devices), strict=True))
        gpu = {"gpu_gib": round(held / _GIB, 2), "gpu_reserved_gib": round(reserved / _GIB, 2)}
    row = {
        "effective_bits": round(plan.bits, 4),
        "weights_per_block": plan.weights,
        "correction": recipe.correction,
        "blocks": shape.layers,
        "block_s": round(total, 2),
        "model_min": round(total * shape.layers / 60, 1),
        "steps_s": {step: round(spent, 2) for step, spent in by_step.items() if len(devices) == 1 or step != "saving"},
        **gpu,
        "host_gib": round(peak_host_memory() / _GIB, 2),
        "host_gib_before": round(before / _GIB, 2),
        "layers": [
            {k: record[k] for k in ("layer", "error", "seconds", "step_seconds", "peak_mib")} for record in records
        ],
    }
    show(row)
    return row, tensors


def show(row: dict[str, Any]) -> None:
    """Prints the table by step, and what follows for the model."""
    table = Table("step", "seconds", "share", box=None)
    for step, seconds in sorted(row["steps_s"].items(), key=lambda item: -item[1]):
        table.add_row(step, f"{seconds:.2f}", f"{100 * seconds / max(row['block_s'], 1e-9):.0f} %")
    table.add_row("one block", f"{row['block_s']:.2f}", "")
    Console(highlight=False).print(table)
    print(f"{row['blocks']} blocks of {row['block_s']:.1f} s: {row['model_min']:.1f} min (extrapolated from one)")
    memory = f"GPU {row['gpu_gib']} GiB held, {row['gpu_reserved_gib']} reserved; " if "gpu_gib" in row else ""
    print(f"peak memory: {memory}host {row['host_gib']} GiB, {row['host_gib_before']} before the block", flush=True)


def host_memory() -> int:
    """What the process holds of the host's memory now, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def describe(devices: list[torch.device]) -> str:
    """The devices in words."""
    if devices[0].type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return f"{len(devices)} x {torch.cuda.get_device_name(devices[0])}"


def versions() -> dict[str, str]:
    """Of what decides over the result."""
    found = {}
    for name in ("torch", "transformers", "vllm-vptq"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            found[name] = "checkout"
    return found


def save(row: dict[str, Any], folder: Path, device: torch.device) -> None:
    """Adds a row to the day's file."""
    folder.mkdir(parents=True, exist_ok=True)
    words = torch.cuda.get_device_name(device).lower().split() if device.type == "cuda" else ["cpu"]
    kind = next((word for word in words if re.search(r"\d", word)), words[-1])  # h100 of "NVIDIA H100 80GB HBM3"
    path = folder / f"quantize-{date.today().isoformat()}-{kind}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(path, flush=True)


if __name__ == "__main__":
    main()
