"""What a run is going to do, known before it does it: a recipe and a spec for every linear layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from quantize.errors import QuantizeError
from quantize.model import Block
from quantize.recipe import LayerRecipe, Recipe
from vllm_vptq.format import LayerSpec, VPTQFormatError, effective_bits
from vllm_vptq.layouts.memory import resident_bytes

_NUMBER = re.compile(r"\.\d+(?=\.)")


def total_bits(specs: Mapping[str, LayerSpec]) -> float:
    """Effective bits of quantized weights: indices, books, norms and permutations over their number."""
    weights = sum(math.prod(spec.shape) for spec in specs.values())
    return sum(effective_bits(spec) * math.prod(spec.shape) for spec in specs.values()) / weights


def resident_bits(specs: Mapping[str, LayerSpec]) -> dict[str, float]:
    """Bits a weight that a GPU holds in each layout, with books and norms; but in compact, indices take whole bytes."""
    weights = sum(math.prod(spec.shape) for spec in specs.values())
    return {layout: 8 * nbytes / weights for layout, nbytes in resident_bytes(specs.values()).items()}


@dataclass(frozen=True)
class Plan:
    """How every linear layer that is quantized is coded, by module name."""

    layers: Mapping[str, LayerRecipe]
    shapes: Mapping[str, tuple[int, int]]

    @cached_property
    def specs(self) -> dict[str, LayerSpec]:
        """The format's description of every layer."""
        return {name: layer.spec(*self.shapes[name]) for name, layer in self.layers.items()}

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())

    @property
    def widest(self) -> int:
        """Inputs of the widest layer."""
        return max(columns for _, columns in self.shapes.values())

    @property
    def bits(self) -> float:
        """Effective bits of the quantized weights."""
        return total_bits(self.specs)


def make_plan(blocks: list[Block], recipe: Recipe, chosen: Mapping[str, LayerRecipe] | None = None) -> Plan:
    """What a recipe gives a model's linears, or what was ``chosen`` for them, as it must be where ``bits`` choose.

    QuantizeError if nothing is left to quantize, if the format can't hold a layer, or if one grows larger than dense.
    """
    layers, shapes = {}, {}
    for block in blocks:
        for name, linear in block.linears.items():
            layer = recipe.layer(name)
            if layer is None:
                continue
            layers[name] = layer if chosen is None else chosen[name]
            shapes[name] = (linear.weight.shape[0], linear.weight.shape[1])
    if not layers:
        raise QuantizeError("the recipe skips every linear layer; nothing to quantize")
    plan = Plan(layers, shapes)
    if recipe.bits is not None and chosen is None:
        return plan  # its books are yet to be chosen
    for name, (out, columns) in shapes.items():
        if columns > 1 << 16 and layers[name].perm:
            raise QuantizeError(f"{name}: perm holds 16-bit columns and this layer has {columns}; set perm to false")
        try:
            LayerSpec.from_config(plan.specs[name].to_config(), name).with_shape(out, columns, name)
        except VPTQFormatError as error:
            raise QuantizeError(str(error)) from error
    worst = max(plan.specs, key=lambda name: effective_bits(plan.specs[name]))
    if effective_bits(plan.specs[worst]) >= 16:
        raise QuantizeError(
            f"{worst}: {effective_bits(plan.specs[worst]):.1f} bits a weight with its codebooks, no less than dense; "
            "use fewer centroids for layers this small"
        )
    return plan


def left_dense(blocks: list[Block]) -> dict[str, int]:
    """Matrices of the blocks that are not quantized, with their sizes: experts, in one tensor or each a linear.

    Those that make up less than a hundredth of their block are left out, modules that differ by number taken together.
    """
    found: dict[str, int] = {}
    for block in blocks:
        inside = {f"{name}.weight" for name in block.linears}
        least = sum(parameter.numel() for parameter in block.module.parameters()) / 100
        dense = {
            name: parameter.numel()
            for name, parameter in block.module.named_parameters(block.name)
            if name not in inside and parameter.ndim > 1
        }
        kinds: Counter[str] = Counter()
        for name, size in dense.items():
            kinds[_NUMBER.sub("", name)] += size
        found |= {name: size for name, size in dense.items() if kinds[_NUMBER.sub("", name)] > least}
    return found


def left_dense_note(blocks: list[Block]) -> str | None:
    """A line that says so to the user; None where there is nothing to say."""
    left = left_dense(blocks)
    if not left:
        return None
    share = sum(left.values()) / sum(p.numel() for block in blocks for p in block.module.parameters())
    return (
        f"{100 * share:.0f} % of the blocks' weights stay dense, first {next(iter(left))}: routed experts, which the "
        "server takes dense only, or in no nn.Linear"
    )
