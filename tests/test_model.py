"""Which modules of a model are its blocks."""

from __future__ import annotations

import pytest
from torch import nn

from quantize.errors import QuantizeError
from quantize.model import decoder_blocks


class Named(nn.Module):
    """Modules by their names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def layer(**more: nn.Module) -> Named:
    return Named(attention=nn.Linear(4, 4), **more)


def many(count: int, **more: int) -> nn.ModuleList:
    """Layers, which may hold lists of linears, by name."""
    return nn.ModuleList(
        layer(**{name: nn.ModuleList(nn.Linear(4, 4) for _ in range(size)) for name, size in more.items()})
        for _ in range(count)
    )


def names(model: nn.Module) -> list[str]:
    return [block.name for block in decoder_blocks(model)]


@pytest.mark.parametrize("tower_first", [True, False])
def test_of_two_lists_as_long_the_outer_one_is_the_decoder(tower_first: bool) -> None:
    tower = {"vision_tower": Named(encoder=Named(layers=many(3)))}
    decoder = {"layers": many(3)}
    model = Named(**(tower | decoder if tower_first else decoder | tower))
    assert names(model) == [f"layers.{i}" for i in range(3)]


def test_stages_are_no_blocks_where_they_hold_longer_lists_of_them() -> None:
    model = Named(stages=nn.ModuleList(Named(layers=many(4)) for _ in range(2)))
    assert names(model) == [f"stages.0.layers.{i}" for i in range(4)]


@pytest.mark.parametrize("inner", ["experts", "heads"])
def test_lists_inside_a_block_are_no_blocks_however_long(inner: str) -> None:
    model = Named(layers=many(2, **{inner: 8}))
    assert names(model) == ["layers.0", "layers.1"]


def test_experts_are_no_blocks_also_where_a_block_holds_nothing_else() -> None:
    model = Named(layers=nn.ModuleList(Named(experts=many(8)) for _ in range(2)))
    assert names(model) == ["layers.0", "layers.1"]


def test_experts_of_any_name_are_part_of_a_block_with_linears_of_its_own() -> None:
    model = Named(layers=nn.ModuleList(layer(mixture=many(8)) for _ in range(2)))
    assert names(model) == ["layers.0", "layers.1"]
    assert len(decoder_blocks(model)[0].linears) == 9


@pytest.mark.parametrize("model", [Named(), layer(), Named(layers=nn.ModuleList([nn.Linear(4, 4)]))])
def test_models_without_blocks_are_refused(model: nn.Module) -> None:
    with pytest.raises(QuantizeError, match="no list of blocks"):
        decoder_blocks(model)
