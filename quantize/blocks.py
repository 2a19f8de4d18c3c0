"""The walk over a model's blocks: one at a time visits the device, has its linears coded, and passes activations on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.devices import Clock, peak_memory, resident, start_peak
from quantize.drift import Original, corrected, drift
from quantize.errors import QuantizeError
from quantize.model import Batch, Block
from quantize.moments import Weights, collect, stages
from quantize.plan import Plan
from quantize.recipe import LayerRecipe, Recipe
from quantize.run import Run, tuned_part
from quantize.solver import solve
from quantize.training import finetune_block, put_tuned, put_weight
from vllm_vptq.format import dequantize, effective_bits


def quantize_blocks(run: Run, plan: Plan, batches: list[Batch], weights: Weights | None) -> None:
    """Codes every linear that has no part yet; ``batches`` go through the coded blocks."""
    original = Original(batches) if run.recipe.drifts else None
    for i, block in enumerate(run.blocks):
        started = time.perf_counter()
        quantize_block(run, plan, i, batches, weights, original)
        run.report.block(block.name, time.perf_counter() - started)


def quantize_block(
    run: Run, plan: Plan, i: int, batches: list[Batch], weights: Weights | None, reference: Original | None = None
) -> dict[str, float]:
    """Codes block i's linears that have no part yet, and takes the batches through the coded block.

    The ``reference``, which goes through the block as it was, is needed where the recipe corrects for drift.
    Gives the seconds by step, those of :class:`quantize.solver.Solution` aside.
    """
    block, clock = run.blocks[i], Clock(run.device)
    names = [name for name in block.linears if name in plan.layers]
    done = sum(name in plan.layers for before in run.blocks[:i] for name in before.linears)
    original = run.recipe.activations == "original"
    with contextlib.ExitStack() as stack:
        stack.enter_context(resident(block.module, run.device))
        twin = stack.enter_context(reference.beside(i, block)) if reference is not None else None
        with clock("forward"):
            order = stages(i, block, names, batches)
        lost = set(names) - {name for stage in order for name in stage}
        if lost:
            raise QuantizeError(f"{min(lost)}: no calibration token reached this layer; skip it with a rule")
        tuning = run.recipe.finetune_blocks.steps
        with clock("forward"):
            hidden = _advanced(i, block.module, batches) if original else None
            wanted = []
            if tuning and tuned_part(block) not in run.parts:
                wanted = wanted_outputs(i, block, batches, run.recipe.correction, reference, twin)
        coded: dict[str, Tensor] = {}
        for stage in order:
            missing = [name for name in stage if name not in run.parts]
            if missing:
                with clock("moments"):
                    targets, moments = _targets(run, i, block, stage, missing, batches, weights, reference, twin)
                with clock("layers"):
                    _solve_stage(run, targets, block, plan.layers, moments)
                del moments, targets
            for name in stage:
                with clock("decoding"):
                    tensors = {key: tensor.to(run.device) for key, tensor in run.parts.load(name).items()}
                    weight = dequantize(tensors, plan.specs[name]).to(block.linears[name].weight.dtype)
                done += 1
                run.report.layer(name, plan.specs[name], run.parts.record(name)["error"], done, len(plan.specs))
                if original:
                    coded[name] = weight
                else:
                    put_weight(block.linears[name], weight)
        for name, weight in coded.items():
            put_weight(block.linears[name], weight)
        if tuning:
            if wanted:
                with clock("training"):
                    run.report.block_tuned(block.name, *finetune_block(run, plan, i, block, batches, wanted))
            put_tuned(run, plan, block)
        with clock("forward"):
            _advance(i, block, batches, hidden)
    return dict(clock.seconds)


def _targets(
    run: Run,
    i: int,
    block: Block,
    stage: list[str],
    missing: list[str],
    batches: list[Batch],
    weights: Weights | None,
    reference: Original | None,
    twin: torch.nn.Module | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the missing linears of a stage are coded towards, and the second moments that say how."""
    targets = {name: block.linears[name].weight.data for name in missing}
    moments = {}
    if reference is not None and twin is not None:
        drifted = drift(i, block, twin, stage[0], batches, reference)
        targets = {name: corrected(w, drifted, run.recipe.correction) for name, w in targets.items()}
        moments = dict.fromkeys(stage, drifted.moment)
    if not moments or weights is not None:
        moments = collect(i, block, stage, batches, weights)
    return targets, moments


@torch.inference_mode()
def _advanced(i: int, module: torch.nn.Module, batches: list[Batch]) -> list[Tensor]:
    """What a block gives for each batch, where the batch is kept."""
    return [batch.run(i, module).to(batch.hidden.device) for batch in batches]


@torch.inference_mode()
def wanted_outputs(
    i: int,
    block: Block,
    batches: list[Batch],
    share: float = 0.0,
    reference: Original | None = None,
    twin: torch.nn.Module | None = None,
) -> list[Tensor]:
    """What block i is trained towards: what it gives for each batch before it is coded.

    With a reference, a ``share`` of the way from there to what its ``twin`` gives the original's activations.
    """
    here = _advanced(i, block.module, batches)
    if reference is None or twin is None:
        return here
    pairs = zip(here, _advanced(i, twin, reference.batches), strict=True)
    return [drifted.lerp(undrifted, share) for drifted, undrifted in pairs]


@torch.inference_mode()
def _advance(i: int, block: Block, batches: list[Batch], known: list[Tensor] | None) -> None:
    for j, batch in enumerate(batches):
        batch.keep(batch.run(i, block.module) if known is None else known[j])


def _solve_stage(
    run: Run,
    targets: Mapping[str, Tensor],
    block: Block,
    layers: Mapping[str, LayerRecipe],
    moments: Mapping[str, Tensor],
) -> None:
    """Codes layers that have the same input, wherever the run has its jobs done; every finished one is a part."""
    names = list(targets)
    jobs = []
    for name, target in targets.items():
        dtype = book_dtype(block.linears[name].weight.dtype)
        curvature = run.curvatures.get(name)
        coding = partial(coded_layer, target, name, layers[name], moments[name], run.recipe, dtype, curvature)
        jobs.append((float(target.numel()), coding))
    run.share(jobs, lambda i, made: run.parts.save(names[i], *made))


@torch.inference_mode()
def coded_layer(
    target: Tensor,
    name: str,
    layer: LayerRecipe,
    moment: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    curvature: Tensor | None,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A layer's tensors, on the CPU, and its record; its peak of memory is its own on a GPU, see ``peak_memory``."""
    started = time.perf_counter()
    start_peak(device)
    try:
        rows = None if curvature is None else curvature.to(device)
        solution = solve(target.to(device), moment.to(device), layer, recipe, dtype, rows)
    except QuantizeError as error:
        raise QuantizeError(f"{name}: {error}") from error
    return solution.tensors, {
        "layer": name,
        "bits": effective_bits(solution.spec),
        "error": solution.error,
        "steps": solution.steps,
        "seconds": round(time.perf_counter() - started, 3),
        "step_seconds": {step: round(seconds, 3) for step, seconds in solution.seconds.items()},
        "peak_mib": peak_memory(device) >> 20,
    }


def book_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """What books and norms are stored in: 16 bits always, or a "2 bit" model would not be one."""
    return torch.float16 if weight_dtype == torch.float32 else weight_dtype
