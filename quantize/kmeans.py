"""Weighted k-means over short vectors, and joint assignment to a main and a residual book."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantize import native
from quantize.sums import IndexedSums

_CHUNK = 1 << 23
"""Distances held at a time."""
_SEED_ROUNDS = 8


Seeding = Literal["spread", "random"]


@dataclass(frozen=True)
class Books:
    """A main book ``[k, v]`` and a residual book ``[r, v]`` or None, float32."""

    main: Tensor
    residual: Tensor | None

    def decode(self, index: Tensor, residual_index: Tensor | None) -> Tensor:
        """The vectors ``[..., v]`` that indices stand for."""
        vectors = self.main[index]
        if self.residual is not None and residual_index is not None:
            vectors = vectors + self.residual[residual_index]
        return vectors


def nearest(points: Tensor, book: Tensor) -> Tensor:
    """The nearest centroid of every point ``[n, v]``: int64 ``[n]``."""
    return assign(points, Books(book, None), 1)[0]


def assign(points: Tensor, books: Books, candidates: int) -> tuple[Tensor, Tensor | None]:
    """Main and residual index of every point ``[n, v]``, chosen together.

    Each of the ``candidates`` nearest main centroids is tried with the residual centroid nearest to what it leaves;
    the pair with the smallest error wins. ``candidates`` 1 is the greedy choice.
    """
    if native.available(points.device):
        return native.assign(points, books.main, books.residual, candidates)
    return assign_torch(points, books, min(candidates, len(books.main)))


def assign_torch(points: Tensor, books: Books, candidates: int) -> tuple[Tensor, Tensor | None]:
    """:func:`assign` in torch, where nothing compiled can be had."""
    if books.residual is None:
        return _ranked(points, books.main, 1)[:, 0], None
    main = _ranked(points, books.main, candidates)
    left = points[:, None, :] - books.main[main]
    residual = _ranked(left.flatten(0, 1), books.residual, 1).view_as(main)
    error = (left - books.residual[residual]).square().sum(2)
    best = error.argmin(1, keepdim=True)
    return main.gather(1, best)[:, 0], residual.gather(1, best)[:, 0]


def _ranked(points: Tensor, book: Tensor, count: int) -> Tensor:
    """The ``count`` nearest centroids of every point, int64 ``[n, count]``; never a whole distance matrix."""
    half_norm = book.square().sum(1) / 2
    parts = []
    for chunk in points.split(max(1, _CHUNK // len(book))):
        score = torch.addmm(half_norm, chunk, book.T, alpha=-1)  # half the squared distance, less |x|^2 / 2
        parts.append(score.argmin(1, keepdim=True) if count == 1 else score.topk(count, 1, largest=False).indices)
    return torch.cat(parts)


def train_books(
    points: Tensor,
    weights: Tensor,
    k: int,
    r: int,
    iterations: int,
    candidates: int,
    generator: torch.Generator,
) -> Books:
    """Books for points ``[n, v]`` with weights ``[n]``: k-means for the main book, then on what it leaves, then both.

    After greedy training the two are refined together: points are assigned jointly, and each book in turn moves to
    the weighted mean of what the other leaves. ``r`` 0 trains a main book alone.
    """
    main = kmeans(points, weights, k, iterations, generator)
    if not r:
        return Books(main, None)
    residual = kmeans(points - main[nearest(points, main)], weights, r, iterations, generator)
    for _ in range(max(1, iterations // 2)):
        index, residual_index = assign(points, Books(main, residual), candidates)
        assert residual_index is not None
        main, _ = _means(points - residual[residual_index], weights, index, main)
        residual, _ = _means(points - main[index], weights, residual_index, residual)
    return Books(main, residual)


def kmeans(
    points: Tensor, weights: Tensor, k: int, iterations: int, generator: torch.Generator, seeding: Seeding = "spread"
) -> Tensor:
    """A book ``[k, v]`` for points ``[n, v]`` with weights ``[n]``, by Lloyd's rounds until nothing moves.

    ``seeding`` "spread" starts from points far from each other, "random" from any, as VPTQ does.
    """
    book = _seed(points, weights, k, generator) if seeding == "spread" else _random(points, k, generator)
    last = None
    for _ in range(iterations):
        index = nearest(points, book)
        if last is not None and torch.equal(index, last):
            break
        book, last = _refill(points, weights, index, *_means(points, weights, index, book)), index
    return book


def _random(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randperm(len(points), generator=generator)[torch.arange(k) % len(points)]
    return points[drawn.to(points.device)]


def _seed(points: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k points, drawn in rounds with a probability that grows with their distance from those drawn before.

    k-means|| (https://arxiv.org/abs/1203.6402) with a fixed number of points a round. Lone weights far outside the
    rest (a model's "super weights") get a centroid of their own this way; a plain random start never finds them,
    and a model can lose all its accuracy over one.
    """
    count = min(k, len(points))
    book = points[_draw(weights, -(-count // _SEED_ROUNDS), generator)]
    while len(book) < count:
        distance = (points - book[nearest(points, book)]).square().sum(1)
        missing = min(-(-count // _SEED_ROUNDS), count - len(book))
        book = torch.cat([book, points[_draw(weights * distance, missing, generator)]])
    if len(book) < k:  # fewer points than centroids: every point has its own, the rest are spare
        book = torch.cat([book, book[torch.arange(k - len(book), device=book.device) % len(book)]])
    return book


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different indices with probabilities proportional to ``weights``: winners of exponential races."""
    uniform = torch.rand(len(weights), generator=generator).to(weights.device).clamp_min(1e-12)
    race = uniform.log() / weights.clamp_min(1e-30)
    return race.topk(count).indices


def _means(points: Tensor, weights: Tensor, index: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of the points of every centroid, and their mass; one without points stays where it is."""
    weighted = torch.cat([points * weights[:, None], weights[:, None]], 1)
    sums = IndexedSums(index, len(book))(weighted)
    total, mass = sums[:, :-1], sums[:, -1]
    return torch.where((mass > 0)[:, None], total / mass.clamp_min(1e-30)[:, None], book), mass


def _refill(points: Tensor, weights: Tensor, index: Tensor, book: Tensor, mass: Tensor) -> Tensor:
    """Moves centroids without mass to the points that are served worst."""
    empty = (mass == 0).nonzero()[:, 0]
    if len(empty) == 0 or len(points) < len(book):
        return book
    error = (points - book[index]).square().sum(1) * weights
    book = book.clone()
    book[empty] = points[error.topk(len(empty)).indices]
    return book
