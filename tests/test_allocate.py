"""Bits: how they are counted, and who gets them."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.books import decibels, fit
from quantize.allocate import allocate, choices, distortion, expected_error, possible_books
from quantize.errors import QuantizeError
from quantize.kmeans import assign, train_books
from quantize.plan import resident_bits, total_bits
from quantize.recipe import LayerRecipe, Recipe, Rule
from quantize.solver import solve
from tests.strategies import few
from tests.tiny import ROOT
from vllm_vptq.format import LayerSpec

SHAPES = {"a": (576, 576), "b": (1536, 576), "c": (192, 576)}
LAYERS = dict.fromkeys(SHAPES, LayerRecipe())


def bits(layers: dict[str, LayerRecipe], names: str = "abc") -> float:
    return total_bits({name: layers[name].spec(*SHAPES[name]) for name in names})


def even(norm: float = 1.0) -> dict[str, dict[bool, float]]:
    """Layers whose loss is that of their weights, and a norm that makes it ``norm`` times as large."""
    return {name: {True: norm * math.prod(shape), False: float(math.prod(shape))} for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("v", "k", "r"), [(2, 16, 0), (4, 256, 0), (3, 256, 0), (6, 64, 64), (4, 64, 16), (7, 256, 256)]
)
def test_distortions_are_those_of_books(v: int, k: int, r: int) -> None:
    gen = torch.Generator().manual_seed(5)
    books = train_books(torch.randn(20000, v, generator=gen), torch.ones(20000), k, r, 10, 4, gen)
    fresh = torch.randn(10000, v, generator=gen)
    found = float((fresh - books.decode(*assign(fresh, books, 4))).square().mean())
    assert found == pytest.approx(distortion(v, k, r), rel=0.06)


@pytest.mark.parametrize(
    ("models", "greedy", "power", "bound"),
    [(("stories15m", "smollm2-135m"), False, 4, 0.2), (("stories15m-paper",), True, 2, 0.6)],
)
def test_what_is_expected_of_books_is_what_layers_gave(models: tuple[str], greedy: bool, power: int, bound: float):
    """Within so many dB for every kind of books, where at most a tenth of the vectors are centroids."""
    found = defaultdict(list)
    for model in models:
        rows = json.loads((ROOT / f"benchmarks/results/books-2026-11-29-{model}.json").read_text())["rows"]
        assert fit(rows)[0] == pytest.approx(power, abs=0.2)
        expected = partial(expected_error, greedy=greedy)
        for row, offset in zip(rows, decibels(rows, expected), strict=True):
            if (row["k"] + row["r"]) * row["v"] * 10 <= row["out_features"] * row["in_features"]:
                found[row["v"], row["k"], row["r"]].append(offset)
    assert len(found) >= 28
    assert all(abs(statistics.mean(offsets)) < bound for offsets in found.values()), found


def test_the_solver_bears_out_what_is_expected() -> None:
    """Tails like those of weights: one book for vectors of 3 beats a pair for vectors of 4, which has more bits."""
    gen = torch.Generator().manual_seed(3)
    normal = torch.randn(384, 192, generator=gen)
    weight = normal / torch.randn(6, 384, 192, generator=gen).square().mean(0).sqrt()  # Student's t, kurtosis 6
    x = torch.randn(4000, 192, generator=gen) @ (torch.eye(192) + 0.05 * torch.randn(192, 192, generator=gen))
    errors, expected = {}, {}
    for v, k, r in ((3, 256, 0), (4, 64, 32)):
        recipe = Recipe.load(None, "fast", vector_length=v, centroids=k, residual_centroids=r)
        errors[v] = solve(weight, x.T @ x / 4000, recipe, recipe, torch.float32).error
        expected[v] = expected_error(v, k, r, weight.numel() / v)
    assert expected[3] < expected[4] and errors[3] < errors[4]
    assert errors[4] / errors[3] == pytest.approx(expected[4] / expected[3], rel=0.05)


def test_books_that_fit_their_layer_are_expected_to_leave_less() -> None:
    assert expected_error(3, 256, 0, 1e12) == pytest.approx(distortion(3, 256, 0), rel=1e-3)
    assert expected_error(3, 256, 0, 2560) == pytest.approx(distortion(3, 256, 0) * 0.9**4, rel=1e-3)
    assert expected_error(3, 256, 0, 200) == 0


def test_choices_lie_on_a_convex_hull() -> None:
    hull = choices(LayerRecipe(), (576, 576), {True: 1.0, False: 1.2}, possible_books(Recipe()))
    assert len(hull) > 8
    slopes = [(b.cost - a.cost) / (b.size - a.size) for a, b in pairwise(hull)]
    assert all(s < 0 for s in slopes) and slopes == sorted(slopes)
    few_books = possible_books(Recipe(largest_book=256, residual_books=False))
    assert all(
        c.layer.centroids <= 256 and not c.layer.residual_centroids
        for c in choices(LayerRecipe(), (576, 576), {True: 1.0}, few_books)
    )


def test_books_of_bytes_take_no_more_on_a_gpu_than_on_disk() -> None:
    """All of one kind, too, so that fused layers are looked up in one way."""
    shapes = {name: (8 * out, 8 * columns) for name, (out, columns) in SHAPES.items()}
    found, any_ = (allocate(LAYERS, shapes, even(), Recipe(bits=2.5, books=books)) for books in ("bytes", "any"))
    assert {(layer.centroids, layer.residual_centroids) for layer in found.values()} == {(256, 256)}
    assert len({layer.vector_length for layer in found.values()}) > 1  # bits in between are a mixture
    specs, others = ({name: layer.spec(*shapes[name]) for name, layer in made.items()} for made in (found, any_))
    assert 2.3 < total_bits(specs) <= 2.5
    resident = resident_bits(specs)
    assert resident["stationary"] == resident["aligned"] < 1.05 * resident["compact"]
    assert resident["compact"] == pytest.approx(total_bits(specs), rel=0.02)
    assert resident_bits(others)["stationary"] > 1.15 * total_bits(others)


def test_what_a_gpu_holds_of_groups_and_outliers() -> None:
    plain = LayerSpec(4096, 1024, 8, 256, 256, enable_norm=False)
    split = replace(plain, group_num=4, enable_perm=True)
    wide = replace(plain, in_features=4096 + 64, outlier_size=64, outlier_vector_len=2, num_outlier_centroids=256)
    plain_bits, split_bits, wide_bits = (resident_bits({"a": spec}) for spec in (plain, split, wide))
    books = 512 * 8 * 16 / (1024 * 4096)
    columns = 32 / 1024  # which of them each segment has
    assert split_bits["stationary"] == pytest.approx(plain_bits["stationary"] + 3 * books + columns)
    outliers = (4 + 256 * 2 * 16 / (1024 * 64)) * 64  # of a row of weights, in bits
    assert wide_bits["compact"] == pytest.approx((plain_bits["compact"] * 4096 + outliers) / 4160 + columns)
    assert wide_bits["stationary"] > wide_bits["compact"]  # few columns, padded
    lists = resident_bits({"a": replace(plain, num_centroids=65536, num_res_centroids=0)})
    assert lists["compact"] < lists["aligned"] * 1.01 < lists["stationary"]


@few(40)
@given(wanted=st.floats(1.7, 6.0), kind=st.sampled_from(["measured", "uniform"]))
def test_the_budget_is_kept_and_used(wanted: float, kind: str) -> None:
    found = allocate(LAYERS, SHAPES, even(), Recipe(bits=wanted, allocation=kind))
    assert bits(found) <= wanted
    assert bits(found) > wanted - (0.1 if kind == "measured" else 0.6)


def test_more_goes_to_those_that_need_it() -> None:
    needy = even() | {"c": {norm: 100 * loss for norm, loss in even()["c"].items()}}
    plain, found = (allocate(LAYERS, SHAPES, s, Recipe(bits=2.5)) for s in (even(), needy))
    assert bits(found, "c") > bits(plain, "c") + 1
    assert bits(found, "ab") < bits(plain, "ab")


def test_a_norm_is_bought_where_it_is_worth_its_bits() -> None:
    for worth, expected in ((0.3, True), (0.99, False)):
        found = allocate(LAYERS, SHAPES, even(worth), Recipe(bits=3))
        assert {layer.norm for layer in found.values()} == {expected}


def test_one_kind_for_all_where_that_is_asked_for() -> None:
    found = allocate(LAYERS, SHAPES, even(), Recipe(bits=2.5, allocation="uniform"))
    assert len(set(found.values())) == 1 and next(iter(found.values())).norm


def test_what_a_rule_says_stays() -> None:
    rule = Rule(match="b", centroids=16, vector_length=2, residual_centroids=0)
    recipe = Recipe(bits=3, rules=(rule,))
    layers = {name: layer for name in SHAPES if (layer := recipe.layer(name))}
    found = allocate(layers, SHAPES, even(), recipe)
    assert (found["b"].vector_length, found["b"].centroids) == (2, 16)
    assert 2.8 < bits(found) <= 3 and bits(found, "b") < 2.2


@pytest.mark.parametrize("kind", ["measured", "uniform"])
def test_too_few_bits_are_refused_with_the_least(kind: str) -> None:
    with pytest.raises(QuantizeError, match=r"bits 1\.0001: .* at least 1\.\d"):
        allocate(LAYERS, SHAPES, even(), Recipe(bits=1.0001, allocation=kind))


def test_bits_count_everything() -> None:
    spec = LayerSpec(576, 576, 4, 256, enable_norm=True)
    assert total_bits({"a": spec}) == pytest.approx(2 + (256 * 4 * 16 + 2 * 576 * 16) / 576**2)
