"""The walk over a model: block by block, collect second moments, solve every linear, write the block."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration import calibration_tokens
from quantize.errors import QuantizeError
from quantize.export import Exporter
from quantize.hessian import SecondMoment
from quantize.model import Batch, Block, decoder_blocks, first_inputs, load
from quantize.recipe import Recipe
from quantize.report import Report
from quantize.solver import Solution, solve
from vllm_vptq.format import LayerSpec, effective_bits

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Plan:
    """Which linear layers get which spec, known before any work is done."""

    specs: Mapping[str, LayerSpec]

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())

    @property
    def bits(self) -> float:
        """Effective bits of the quantized weights: indices, books, norms and permutations over their number."""
        return sum(effective_bits(spec) * math.prod(spec.shape) for spec in self.specs.values()) / self.weights


def make_plan(blocks: list[Block], recipe: Recipe) -> Plan:
    """The specs a recipe gives a model's linears; QuantizeError if it leaves none or makes one larger than dense."""
    specs = {}
    for block in blocks:
        for name, linear in block.linears.items():
            layer = recipe.layer(name)
            if layer is None:
                continue
            out, cols = linear.weight.shape
            if cols > 1 << 16 and layer.perm:
                raise QuantizeError(f"{name}: perm holds 16-bit columns and this layer has {cols}; set perm to false")
            specs[name] = layer.spec(out, cols)
    if not specs:
        raise QuantizeError("the recipe skips every linear layer; nothing to quantize")
    worst = max(specs, key=lambda name: effective_bits(specs[name]))
    if effective_bits(specs[worst]) >= 16:
        raise QuantizeError(
            f"{worst}: {effective_bits(specs[worst]):.1f} bits a weight with its codebooks, no less than dense; "
            "use fewer centroids for layers this small"
        )
    return Plan(specs)


def quantize_model(source: str, out: Path, recipe: Recipe, report: Report) -> Plan:
    """Quantizes a model and writes the checkpoint to ``out``; see ``Recipe`` for what can be chosen."""
    device = _device(recipe)
    # On a GPU sums by index would otherwise depend on the order of atomic additions.
    torch.use_deterministic_algorithms(True, warn_only=True)
    exporter = Exporter(out)
    report.stage("loading the model")
    model, tokenizer = load(source, device)
    blocks = decoder_blocks(model)
    plan = make_plan(blocks, recipe)
    report.plan(source, plan.specs, plan.weights, plan.bits)

    report.stage("calibration text" if recipe.calibration else "calibration text, written by the model")
    ids = calibration_tokens(model, tokenizer, recipe, report.progress)
    size = max(1, _BATCH_TOKENS // recipe.context)
    batches = first_inputs(model, blocks, [part.to(device) for part in ids.split(size)])

    report.stage("quantizing")
    done = 0
    for i, block in enumerate(blocks):
        started = time.perf_counter()
        moments = _collect(i, block, batches, plan)
        tensors: dict[str, Tensor] = {}
        for name, solution in _solve_block(block, moments, recipe):
            tensors |= {f"{name}.{key}": tensor for key, tensor in solution.tensors.items()}
            done += 1
            report.layer(name, solution.spec, solution.error, done, len(plan.specs))
        _advance(i, block, batches)
        tensors |= {f"{block.name}.{k}": v for k, v in _dense_state(block, plan).items()}
        exporter.add_shard(tensors)
        report.block(block.name, time.perf_counter() - started)
    rest = {k: v for k, v in _untied_state(model).items() if not k.startswith(tuple(f"{b.name}." for b in blocks))}
    exporter.add_shard(rest)
    exporter.finish(model, tokenizer, plan.specs, recipe)
    return plan


def _device(recipe: Recipe) -> torch.device:
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise QuantizeError("device cuda was asked for and torch finds none")
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(recipe.device)


@torch.inference_mode()
def _collect(i: int, block: Block, batches: list[Batch], plan: Plan) -> dict[str, SecondMoment]:
    """Second moments of the block's linears. Layers that receive the same tensor (q, k and v) share one."""
    moments: dict[str, SecondMoment] = {}
    latest: dict[str, Any] = {"input": None, "moment": None}

    def record(name: str, linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if latest["input"] is not x:
            moment = moments.get(name) or SecondMoment(linear.in_features, x.device)
            moment.add(x)
            latest.update(input=x, moment=moment)
        moments[name] = latest["moment"]

    hooks = [
        linear.register_forward_pre_hook(partial(record, name))
        for name, linear in block.linears.items()
        if name in plan.specs
    ]
    for batch in batches:
        batch.run(i, block.module)
    for hook in hooks:
        hook.remove()
    return moments


@torch.inference_mode()
def _solve_block(block: Block, moments: dict[str, SecondMoment], recipe: Recipe) -> Iterator[tuple[str, Solution]]:
    """Solves the block's linears, puts the coded weights in their place, and yields the solutions."""
    for name, linear in block.linears.items():
        layer = recipe.layer(name)
        if layer is None:
            continue
        if name not in moments:
            raise QuantizeError(f"{name}: no calibration token reached this layer; skip it with a rule")
        try:
            solution = solve(linear.weight.data, moments[name].mean(), layer, recipe, linear.weight.dtype)
        except QuantizeError as error:
            raise QuantizeError(f"{name}: {error}") from error
        linear.weight.data.copy_(solution.weight)
        yield name, solution


@torch.inference_mode()
def _advance(i: int, block: Block, batches: list[Batch]) -> None:
    """Takes the batches through the block, whose weights are the coded ones by now."""
    for batch in batches:
        batch.hidden = batch.run(i, block.module)


def _dense_state(block: Block, plan: Plan) -> dict[str, Tensor]:
    """The block's tensors that stay as they are: norms, biases, linears left dense."""
    prefix = f"{block.name}."
    coded = {f"{name.removeprefix(prefix)}.weight" for name in block.linears if name in plan.specs}
    return {name: tensor for name, tensor in block.module.state_dict().items() if name not in coded}


def _untied_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors, each once: a tied head is the embedding."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors
