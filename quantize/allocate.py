"""Given an average of effective bits, which layer gets which books.

A layer's share of the end loss is taken as its measured sensitivity times the distortion of its books, and the sum is
made small within the budget: the classic allocation by Lagrange multiplier over each layer's lower convex hull.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantize.errors import QuantizeError
from quantize.plan import total_bits
from quantize.recipe import BYTE_BOOK, LayerRecipe, Recipe
from vllm_vptq.format import effective_bits

# How far k-means books stay behind the rate-distortion bound of a Gaussian source, in dB, by vector length and index
# bits a weight: measured on fresh samples with train_books, 15 rounds, 4 candidates.
_GAPS = {
    2: [(1.0, 1.63), (1.5, 2.15), (2.0, 2.50), (2.5, 2.95), (3.0, 2.97), (3.5, 3.20), (4.0, 3.31)],
    3: [(1.33, 1.86), (2.0, 2.33), (2.67, 2.56), (3.33, 2.66)],
    4: [(1.0, 1.41), (1.5, 1.81), (2.0, 2.10), (2.5, 2.22), (3.0, 2.35)],
    5: [(1.6, 1.74), (2.0, 1.89)],
    6: [(1.0, 1.33), (1.33, 1.53), (1.67, 1.65), (2.0, 1.82)],
    8: [(1.0, 1.20), (1.25, 1.30)],
}
_RESIDUAL_GAPS = {
    4: [(2.5, 2.72), (3.0, 3.05), (4.0, 3.66)],
    6: [(2.0, 2.19), (2.33, 2.32), (2.67, 2.53)],
    8: [(1.75, 1.85), (2.0, 1.97)],
}
_BYTE_GAPS = {3: 4.67, 5: 2.97, 7: 2.17, 12: 1.33, 16: 1.09}
"""Of two books of 256 entries, for vector lengths that are otherwise not chosen; measured in the same way."""
# What the solver makes of them on weights of language models, whose tails are heavier (kurtosis 3.4 to 8), in dB beyond
# that, by vector length and index bits: twelve layers of two models, benchmarks/books.py.
_ON_WEIGHTS = {
    2: [(2.0, 0.9), (2.5, 0.4), (3.0, 0.4), (3.5, 0.2), (4.0, 0.03)],
    3: [(2.0, 0.27), (2.33, 0.15), (2.67, 0.0), (3.0, -0.06), (3.33, -0.13)],
    4: [(2.0, 0.08), (2.25, -0.01), (2.5, -0.08), (3.0, -0.1)],
}
_ON_WEIGHTS_RESIDUAL = {
    3: [(5.33, -0.28)],
    4: [(2.75, 0.23), (3.0, 0.2), (3.5, -0.11), (4.0, -0.28)],
    5: [(3.2, -0.2)],
    6: [(2.33, -0.05), (2.67, -0.15)],
}
_UNEQUAL = {4: -0.07, 5: -0.05, 6: -0.03}
"""dB for every doubling of a main book over its residual book, by vector length: the nearer to a single book."""
_GREEDY = 0.9
"""dB that pairs lose when the main index is chosen without a look at the residual one, as VPTQ does."""
_FITTING, _FITTING_UNREFINED = 4, 2
"""Power of the share of a layer's vectors that are more than its centroids, with which the error of books made for the
layer falls, refined by least squares or, by VPTQ, not: 4.1 and 2.1; books of fresh vectors would have none."""
_LEAST_VECTORS = 4
"""Vectors a centroid must have on average: with fewer, books learn them by heart, at the price of storing them."""


def distortion(v: int, k: int, r: int) -> float:
    """Mean squared error of k-means books on a Gaussian source of variance 1, by interpolation of measured ones."""
    bits = math.log2(k * max(r, 1)) / v
    if v in _BYTE_GAPS and k == r == BYTE_BOOK:
        return float(4**-bits * 10 ** (_BYTE_GAPS[v] / 10))
    return float(4**-bits * 10 ** (_at((_RESIDUAL_GAPS if r else _GAPS)[v], bits) / 10))


def expected_error(v: int, k: int, r: int, vectors: float, greedy: bool = False) -> float:
    """Of a layer of so many vectors, coded with books of its own: in proportion to what the solver leaves of it.

    ``greedy``: by ``algorithm: vptq``, which chooses the indices of a pair one after the other and refines nothing.
    """
    bits = math.log2(k * max(r, 1)) / v
    more = _at((_ON_WEIGHTS_RESIDUAL if r else _ON_WEIGHTS).get(v, [(bits, 0.0)]), bits)
    if r:
        more += _UNEQUAL.get(v, 0.0) * math.log2(k / r) + _GREEDY * greedy
    power = _FITTING_UNREFINED if greedy else _FITTING
    return distortion(v, k, r) * 10 ** (more / 10) * max(0.0, 1 - (k + r) / vectors) ** power


def _at(points: list[tuple[float, float]], bits: float) -> float:
    """Between points by interpolation, beyond them what the last one is."""
    (b0, g0), (b1, g1) = points[0], points[-1]
    for left, right in pairwise(points):
        if left[0] <= bits <= right[0]:
            (b0, g0), (b1, g1) = left, right
    share = min(max((bits - b0) / (b1 - b0), 0.0), 1.0) if b1 > b0 else 0.0
    return g0 + share * (g1 - g0)


@dataclass(frozen=True)
class Choice:
    """One way to code a layer: its size in bits and its predicted share of the end loss."""

    layer: LayerRecipe
    size: float
    cost: float


def choices(
    layer: LayerRecipe,
    shape: tuple[int, int],
    sensitivity: Mapping[bool, float],
    books: Sequence[tuple[int, int, int]],
    greedy: bool = False,
) -> list[Choice]:
    """Every way to code a layer of ``shape`` that has a use, on the lower convex hull, smallest first.

    ``books`` are vector lengths with the sizes of a main and a residual book. ``sensitivity`` is the loss per unit of
    distortion, with and without a norm.
    """
    found = []
    weights = math.prod(shape)
    for v, k, r in books:
        count = weights / v
        if k * _LEAST_VECTORS > count or r * _LEAST_VECTORS > count:
            continue
        for norm, sensible in sensitivity.items():
            sized = layer.model_copy(update={"vector_length": v, "centroids": k, "residual_centroids": r, "norm": norm})
            bits = effective_bits(sized.spec(*shape))
            if bits < 16:
                found.append(Choice(sized, bits * weights, sensible * expected_error(v, k, r, count, greedy)))
    return _hull(found)


def possible_books(recipe: Recipe) -> list[tuple[int, int, int]]:
    """Vector lengths with the sizes of a main and a residual book, 0 for none, that a recipe allows."""
    if recipe.books == "bytes":
        return [(v, BYTE_BOOK, BYTE_BOOK) for v in sorted(_RESIDUAL_GAPS.keys() | _BYTE_GAPS.keys())]
    sizes = [1 << bits for bits in range(2, 17) if 1 << bits <= recipe.largest_book]
    found = [(v, k, 0) for v in _GAPS for k in sizes if 1 <= math.log2(k) / v <= 8]
    if recipe.residual_books:
        pairs = [(k, r) for k in sizes for r in sizes if r <= k <= 16 * r]
        found += [(v, k, r) for v in _RESIDUAL_GAPS for k, r in pairs if 1 <= math.log2(k * r) / v <= 8]
    return found


def _hull(found: list[Choice]) -> list[Choice]:
    hull: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.size, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.cost - a.cost) / (b.size - a.size) if b.size > a.size else -math.inf


def allocate(
    layers: Mapping[str, LayerRecipe],
    shapes: Mapping[str, tuple[int, int]],
    sensitivity: Mapping[str, Mapping[bool, float]],
    recipe: Recipe,
) -> dict[str, LayerRecipe]:
    """A recipe for every layer, at most ``recipe.bits`` on average and as close to it as the books allow.

    QuantizeError if the smallest books are more than that already.
    """
    assert recipe.bits is not None
    budget = recipe.bits * sum(math.prod(shapes[name]) for name in layers)
    if recipe.allocation == "uniform":
        return _uniform(layers, shapes, recipe)
    fixed = {name: layer for name, layer in layers.items() if recipe.is_fixed(name)}
    budget -= sum(effective_bits(layer.spec(*shapes[n])) * math.prod(shapes[n]) for n, layer in fixed.items())
    books = possible_books(recipe)
    open_ = {
        n: choices(layer, shapes[n], sensitivity[n], books, recipe.algorithm == "vptq") for n, layer in layers.items()
    }
    open_ = {name: hull for name, hull in open_.items() if name not in fixed and hull}
    at = dict.fromkeys(open_, 0)
    spent = sum(hull[0].size for hull in open_.values())
    if spent > budget:
        _refuse(recipe, spent / sum(math.prod(shapes[name]) for name in open_) if open_ else math.inf)
    # Steps along the hulls, the steepest first, are what the multiplier would choose; those that no longer fit are
    # left out.
    steps = [(_slope(hull[i], hull[i + 1]), name, i + 1) for name, hull in open_.items() for i in range(len(hull) - 1)]
    for _, name, i in sorted(steps):
        more = open_[name][i].size - open_[name][i - 1].size
        if at[name] == i - 1 and spent + more <= budget:
            at[name], spent = i, spent + more
    chosen = {name: hull[at[name]].layer for name, hull in open_.items()}
    return {name: fixed.get(name) or chosen.get(name, layer) for name, layer in layers.items()}


def _uniform(
    layers: Mapping[str, LayerRecipe], shapes: Mapping[str, tuple[int, int]], recipe: Recipe
) -> dict[str, LayerRecipe]:
    assert recipe.bits is not None
    best: dict[str, LayerRecipe] = {}
    lowest = least = math.inf
    greedy = recipe.algorithm == "vptq"
    sizes = [math.prod(shapes[name]) for name in layers if not recipe.is_fixed(name)]
    for v, k, r in sorted(possible_books(recipe), key=lambda books: max(books[1:])):
        update = {"vector_length": v, "centroids": k, "residual_centroids": r}
        sized = {
            name: layer if recipe.is_fixed(name) else layer.model_copy(update=update) for name, layer in layers.items()
        }
        bits = total_bits({name: layer.spec(*shapes[name]) for name, layer in sized.items()})
        least = min(least, bits)
        if bits > recipe.bits:
            continue
        error = sum(expected_error(v, k, r, size / v, greedy) * size for size in sizes)
        if error < 0.99 * lowest:  # for less, a book that is smaller and quicker to look up
            best, lowest = sized, error
    if not best:
        _refuse(recipe, least)
    return best


def _refuse(recipe: Recipe, least: float) -> None:
    raise QuantizeError(f"bits {recipe.bits}: with books and norms counted, these layers need at least {least:.2f}")
