"""What a run would take, from shapes alone."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor, nn

from quantize.allocate import allocate
from quantize.calibration import wanted_tokens, writes_itself
from quantize.curvature import CURVATURE_TOKENS, coupled
from quantize.devices import fits, free_memory
from quantize.kmeans import Books, assign
from quantize.model import decoder_blocks
from quantize.plan import Plan, make_plan
from quantize.recipe import Recipe
from vllm_vptq.format import LayerSpec, effective_bits

_GIB = 2.0**30
_STAGES = 4
"""Inputs of a block's linears, about: q with k and v, o, gate with up, down; each takes half a forward pass."""


def planned(model: nn.Module, recipe: Recipe) -> Plan:
    """The plan of a run; where sensitivities would be measured, every weight counts alike."""
    blocks = decoder_blocks(model)
    plan = make_plan(blocks, recipe)
    if recipe.bits is None:
        return plan
    even = {name: dict.fromkeys((True, False), float(math.prod(shape))) for name, shape in plan.shapes.items()}
    return make_plan(blocks, recipe, allocate(plan.layers, plan.shapes, even, recipe))


def too_large(
    model: nn.Module, plan: Plan, recipe: Recipe, device: torch.device, calibrated: bool = False
) -> str | None:
    """Why a run cannot be done on its first device, with the remedy: some steps need the whole model there.

    A run that was killed may be ``calibrated`` already.
    """
    whole = fits(model, device)
    if recipe.curvature and device.type != "cpu":
        matrices = _curvature_bytes(plan)
        room = free_memory(device) - (sum(parameter.nbytes for parameter in model.parameters()) if whole else 0)
        if 2 * matrices > room:  # the other half is for a batch's activations and their gradients
            return (
                f"coupled rows need matrices of {matrices / _GIB:.1f} GiB on {device}, which has room for "
                f"{max(room, 0) / 2 / _GIB:.1f}; leave them out: --no-curvature, or curvature: false"
            )
    if whole:
        return None
    if recipe.finetune.steps:
        return (
            f"training end to end needs the model on {device} twice, and it is too large for that; choose a recipe "
            "without: --finetune-steps 0, or finetune: {steps: 0}"
        )
    if writes_itself(recipe) and not calibrated:
        return f"the model is too large for {device} to write its own text; give it some by --calibration"
    return None


def table(plan: Plan) -> Table:
    """The plan's layers, those that are alike in one row."""
    kinds = Counter((name.rpartition(".")[2], spec) for name, spec in plan.specs.items())
    made = Table("layer", "shape", "books", "norm", "bits", "MiB", box=None)
    for (leaf, spec), count in kinds.items():
        bits = effective_bits(spec)
        made.add_row(
            f"{leaf} x{count}",
            "x".join(map(str, spec.shape)),
            f"v{spec.vector_len}-k{spec.num_centroids}-{spec.num_res_centroids}",
            "yes" if spec.enable_norm else "no",
            f"{bits:.3f}",
            f"{count * bits * math.prod(spec.shape) / 8 / 2**20:.2f}",
        )
    return made


def estimate(model: nn.Module, plan: Plan, recipe: Recipe) -> str:
    """Time and GiB a run would take on this machine, from its measured speed at the two things that take long.

    Reading the model, text the model writes itself and fine-tuning's memory traffic are not counted: a rough figure.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")
    searched = sum(_searched(spec, recipe) for spec in plan.specs.values())
    tokens = wanted_tokens(recipe, plan.widest)
    multiplied = sum(_multiplied(spec, recipe, tokens) for spec in plan.specs.values())
    parameters = sum(p.numel() for p in model.parameters())
    multiplied += 2 * tokens * plan.weights * (_STAGES / 2 + 1) * _prefixes(recipe)
    multiplied += 8 * recipe.finetune.steps * recipe.finetune.tokens * parameters
    if recipe.curvature:
        multiplied += 6.0 * min(tokens, CURVATURE_TOKENS) * parameters
    seconds = searched / _search_rate(device) + multiplied / _product_rate(device)
    largest = max(math.prod(spec.shape) for spec in plan.specs.values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # A GPU holds one block at a time.
    resident = weights if device.type == "cpu" else weights / len(decoder_blocks(model))
    memory = resident + 4 * (5 * plan.widest**2 + 6 * largest)
    if recipe.finetune.steps:
        # What is decoded is kept for the backward pass on a CPU; on a GPU indices are, and their order.
        kept = 12.0 * plan.weights if device.type == "cpu" else sum(map(_index_bytes, plan.specs.values()))
        memory += 2 * weights - resident + kept
    if recipe.curvature:
        memory += _curvature_bytes(plan)
    return f"about {_duration(seconds)} and {memory / _GIB:.1f} GiB on this machine ({device.type})"


def _curvature_bytes(plan: Plan) -> int:
    """Of what couples output rows, float32 matrices of every layer at once."""
    return 4 * sum(plan.shapes[name][0] ** 2 for name in coupled(plan.shapes))


def _index_bytes(spec: LayerSpec) -> float:
    """Of indices and their order, each int32, for every book."""
    return 8 * (2 if spec.num_res_centroids else 1) * math.prod(spec.shape) / spec.vector_len


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _searched(spec: LayerSpec, recipe: Recipe) -> float:
    """Products with centroids: every vector against its books, in the walk and in every round."""
    centroids = spec.num_centroids + recipe.candidates * spec.num_res_centroids
    return 2.0 * math.prod(spec.shape) * centroids * (2 + recipe.rounds)


def _multiplied(spec: LayerSpec, recipe: Recipe, tokens: int) -> float:
    out, columns = spec.shape
    passes = 2 + recipe.rounds * (2 + recipe.fit_steps * (2 if spec.enable_norm else 1))
    return 2.0 * out * columns**2 * passes + 2.0 * columns**3 + 2.0 * tokens * columns**2 * _prefixes(recipe)


def _prefixes(recipe: Recipe) -> int:
    """Activations on their way: of the coded prefix, and of the original beside it where targets are corrected."""
    return 2 if recipe.drifts else 1


def _search_rate(device: torch.device) -> float:
    size, k = (20000, 256) if device.type == "cpu" else (1 << 18, 4096)
    points, book = torch.randn(size, 4, device=device), torch.randn(k, 4, device=device)
    return _rate(lambda: assign(points, Books(book, None), 1)[0], 2.0 * points.numel() * len(book))


def _product_rate(device: torch.device) -> float:
    size = 1024 if device.type == "cpu" else 4096
    square = torch.randn(size, size, device=device)
    return _rate(lambda: square @ square, 2.0 * size**3)


def _rate(work: Callable[[], Tensor], size: float) -> float:
    """Operations a second of a function that gives a tensor, after a first call that warms up."""
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        float(work().flatten()[0])  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return size / best
