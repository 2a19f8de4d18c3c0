"""What every layer is worth to the end loss: measured on the original model, before any bits are given away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from quantize.allocate import distortion
from quantize.devices import Share, ignore, resident
from quantize.model import Batch, Block, first_inputs
from quantize.moments import collect, output_gradients, stages
from quantize.parts import Parts
from quantize.plan import Plan
from quantize.recipe import LayerRecipe, Recipe
from quantize.solver import solve

_PILOT = {"vector_length": 4, "centroids": 64, "residual_centroids": 0, "groups": 1, "outliers": 0}
_NORMS = (True, False)


def measure(
    model: nn.Module,
    blocks: list[Block],
    plan: Plan,
    batches: Sequence[Tensor],
    recipe: Recipe,
    share: Share,
    progress: Callable[[int, int], None],
    parts: Parts,
) -> dict[str, dict[bool, float]]:
    """For every layer, with and without a norm, end loss per unit of distortion of its books, up to a factor.

    Every layer is coded once with small books. The loss of that in the layer's outputs, times the mean squared
    gradient of the end loss there (its Fisher information), over the books' distortion, is the answer. ``batches``
    are token ids; layers that they do not reach are worth as little as any. Gradients, and what every block is found
    to be, are kept among the parts.
    """
    gradients = parts.read_json("gradients")
    if gradients is None:
        rows = {name: [slice(0, shape[0])] for name, shape in plan.shapes.items()}
        _, gradients = output_gradients(model, blocks, rows, batches)
        parts.write_json("gradients", gradients)
    hidden = first_inputs(model, blocks, list(batches))
    quick = recipe.model_copy(update={"algorithm": "joint", "rounds": 0, "iterations": 5})
    found: dict[str, dict[bool, float]] = {}

    for i, block in enumerate(blocks):
        part = f"{block.name}.worth"
        with resident(block.module, batches[0].device):
            known = parts.read_json(part)
            if known is None:
                known = _measure_block(i, block, plan, hidden, gradients, quick, share)
                parts.write_json(part, known)
            found |= {name: dict(zip(_NORMS, losses, strict=True)) for name, losses in known.items()}
            progress(len(found), len(plan.layers))
            with torch.inference_mode():
                for batch in hidden:
                    batch.keep(batch.run(i, block.module))
    least = {norm: min((losses[norm] for losses in found.values()), default=1.0) for norm in _NORMS}
    return {name: found.get(name, least) for name in plan.layers}


def _measure_block(
    i: int,
    block: Block,
    plan: Plan,
    hidden: list[Batch],
    gradients: Mapping[str, float],
    recipe: Recipe,
    share: Share,
) -> dict[str, list[float]]:
    """The losses of block i's layers that the batches reach, in the order of ``_NORMS``."""
    found = {}
    for stage in stages(i, block, [name for name in block.linears if name in plan.layers], hidden):
        moments = collect(i, block, stage, hidden)
        jobs = []
        for name in stage:
            weight, layer = block.linears[name].weight.data, plan.layers[name]
            worth = partial(pilot_losses, weight, moments[name], gradients[name], layer, recipe)
            jobs.append((float(weight.numel()), worth))
        for name, losses in zip(stage, share(jobs, ignore), strict=True):
            found[name] = [losses[norm] for norm in _NORMS]
    return found


def pilot_losses(
    weight: Tensor, moment: Tensor, gradient: float, layer: LayerRecipe, recipe: Recipe, device: torch.device
) -> dict[bool, float]:
    """A layer's end loss per unit of distortion, with and without a norm, from coding it with small books.

    ``gradient`` is the mean squared gradient of the end loss in its outputs.
    """
    weight, moment = weight.to(device), moment.to(device)
    total, losses = float((weight.float() @ moment * weight.float()).sum()), {}
    for norm in _NORMS:
        pilot = layer.model_copy(update=_PILOT | {"norm": norm})
        error = solve(weight, moment, pilot, recipe, torch.float32).error
        losses[norm] = gradient * error * total / distortion(4, 64, 0)
    return losses
