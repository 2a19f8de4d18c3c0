"""Weighted k-means over short vectors, and joint assignment to a main and a residual book."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vptq.build import cpu_library

_CHUNK = 1 << 23
"""Distances held at a time."""


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
    candidates = min(candidates, len(books.main))
    if points.device.type == "cpu":
        return _assign_native(points, books, candidates)
    return assign_torch(points, books, candidates)


def assign_torch(points: Tensor, books: Books, candidates: int) -> tuple[Tensor, Tensor | None]:
    """:func:`assign` in torch, for GPUs: 20 times slower than the native one on a CPU."""
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


def _assign_native(points: Tensor, books: Books, candidates: int) -> tuple[Tensor, Tensor | None]:
    points, main = points.contiguous(), books.main.contiguous()
    second = None if books.residual is None else books.residual.contiguous()
    index = torch.empty(len(points), dtype=torch.int64)
    residual_index = None if second is None else torch.empty_like(index)
    pointer = ctypes.c_void_p
    failed = cpu_library("assign").vptq_assign(
        pointer(points.data_ptr()),
        ctypes.c_int64(len(points)),
        ctypes.c_int(points.shape[1]),
        pointer(main.data_ptr()),
        ctypes.c_int(len(main)),
        pointer(None if second is None else second.data_ptr()),
        ctypes.c_int(0 if second is None else len(second)),
        ctypes.c_int(candidates),
        pointer(index.data_ptr()),
        pointer(None if residual_index is None else residual_index.data_ptr()),
    )
    if failed:
        raise ValueError(f"vector length {points.shape[1]}, expected 2 to 16")
    return index, residual_index


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
    main = _kmeans(points, weights, k, iterations, generator)
    if not r:
        return Books(main, None)
    residual = _kmeans(points - main[nearest(points, main)], weights, r, iterations, generator)
    for _ in range(max(1, iterations // 2)):
        index, residual_index = assign(points, Books(main, residual), candidates)
        assert residual_index is not None
        main = _means(points - residual[residual_index], weights, index, main)
        residual = _means(points - main[index], weights, residual_index, residual)
    return Books(main, residual)


def _kmeans(points: Tensor, weights: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    book = _seed(points, weights, k, generator)
    for _ in range(iterations):
        index = nearest(points, book)
        book = _refill(points, weights, index, _means(points, weights, index, book))
    return book


def _seed(points: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k points drawn by weight. Weighted sampling without replacement: the k largest of Exponential(weight) races."""
    uniform = torch.rand(len(points), generator=generator).to(points.device).clamp_min(1e-12)
    race = uniform.log() / weights.clamp_min(1e-30)
    chosen = race.topk(min(k, len(points))).indices
    book = points[chosen]
    if len(book) < k:  # fewer points than centroids: every point has its own, the rest are spare
        book = torch.cat([book, book[torch.arange(k - len(book), device=book.device) % len(book)]])
    return book.clone()


def _means(points: Tensor, weights: Tensor, index: Tensor, book: Tensor) -> Tensor:
    """Weighted means of the points of every centroid; one without points stays where it is."""
    mass = torch.zeros(len(book), device=book.device).index_add_(0, index, weights)
    total = torch.zeros_like(book).index_add_(0, index, points * weights[:, None])
    return torch.where((mass > 0)[:, None], total / mass.clamp_min(1e-30)[:, None], book)


def _refill(points: Tensor, weights: Tensor, index: Tensor, book: Tensor) -> Tensor:
    """Moves centroids without points to the points that are served worst."""
    empty = (torch.bincount(index, minlength=len(book)) == 0).nonzero()[:, 0]
    if len(empty) == 0 or len(points) < len(book):
        return book
    error = (points - book[index]).square().sum(1) * weights
    book = book.clone()
    book[empty] = points[error.topk(len(empty)).indices]
    return book
