"""What every layer is worth to the end loss: measured on the original model, before any bits are given away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from quantize.allocate import distortion
from quantize.devices import resident, share
from quantize.model import Block, first_inputs
from quantize.moments import collect, output_gradients, stages
from quantize.plan import Plan
from quantize.recipe import Recipe
from quantize.solver import solve

_PILOT = {"vector_length": 4, "centroids": 64, "residual_centroids": 0, "groups": 1, "outliers": 0}


def measure(
    model: nn.Module,
    blocks: list[Block],
    plan: Plan,
    batches: Sequence[Tensor],
    recipe: Recipe,
    devices: Sequence[torch.device],
    progress: Callable[[int, int], None],
) -> dict[str, dict[bool, float]]:
    """For every layer, with and without a norm, end loss per unit of distortion of its books, up to a factor.

    Every layer is coded once with small books. The loss of that in the layer's outputs, times the mean squared
    gradient of the end loss there (its Fisher information), over the books' distortion, is the answer. ``batches``
    are token ids.
    """
    rows = {name: [slice(0, shape[0])] for name, shape in plan.shapes.items()}
    _, gradients = output_gradients(model, blocks, rows, batches)
    hidden = first_inputs(model, blocks, list(batches))
    quick = recipe.model_copy(update={"algorithm": "joint", "rounds": 0, "iterations": 5})
    pilot_distortion = distortion(4, 64, 0)
    found: dict[str, dict[bool, float]] = {}

    def worth(block: Block, name: str, moment: Tensor, device: torch.device) -> dict[bool, float]:
        weight, moment = block.linears[name].weight.data.to(device), moment.to(device)
        total, losses = float((weight.float() @ moment * weight.float()).sum()), {}
        for norm in (True, False):
            layer = plan.layers[name].model_copy(update=_PILOT | {"norm": norm})
            error = solve(weight, moment, layer, quick, torch.float32).error
            losses[norm] = gradients[name] * error * total / pilot_distortion
        return losses

    for i, block in enumerate(blocks):
        names = [name for name in block.linears if name in plan.layers]
        with resident(block.module, batches[0].device):
            for stage in stages(i, block, names, hidden[0]):
                moments = collect(i, block, stage, hidden)
                jobs = [(math.prod(plan.shapes[name]), partial(worth, block, name, moments[name])) for name in stage]
                found |= dict(zip(stage, share(devices, jobs), strict=True))
                progress(len(found), len(plan.layers))
            with torch.inference_mode():
                for batch in hidden:
                    batch.keep(batch.run(i, block.module))
    return found
