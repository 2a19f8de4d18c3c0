"""Refinement with indices fixed: the layer loss is quadratic in the centroids, and in the norm; solve for its minimum.

``tr(G E^T H E)`` with ``E = target - Q`` and Q linear in what is looked for; G is one where rows are not coupled. The
normal equations of the centroids are never formed: conjugate gradients need a lookup, products with H and G and a sum
over indices each step, whatever the size of the books.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantize.columns import Codes, Segment, as_vectors, decode
from quantize.kmeans import Books
from quantize.slab import Slab
from quantize.sums import IndexedSums

_RIDGE = 1e-4
"""Relative to the diagonal, towards the present values: what the data say nothing about stays where it is."""


def conjugate_gradient(apply: Callable[[Tensor], Tensor], rhs: Tensor, diagonal: Tensor, steps: int) -> Tensor:
    """Approximately solves ``A x = rhs`` for symmetric A, starting from zero; all vectors ``[n]``.

    ``diagonal`` preconditions (Jacobi). Fewer steps than n regularise; each one lowers ``x A x / 2 - rhs x``.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-30), torch.zeros_like(diagonal))
    x = torch.zeros_like(rhs)
    residual = rhs.clone()
    direction = inverse * residual
    power = start = torch.dot(residual, direction)
    for _ in range(steps):
        product = apply(direction)
        curvature = torch.dot(direction, product)
        if not (float(curvature) > 0 and float(power) > 1e-10 * float(start)):
            break
        step = power / curvature
        x += step * direction
        residual -= step * product
        scaled = inverse * residual
        before, power = power, torch.dot(residual, scaled)
        direction = scaled + power / before * direction
    return x


def fit_books(slabs: list[Slab], segments: list[Segment], codes: list[list[Codes]], steps: int) -> list[Segment]:
    """The segments with centroids that minimise the loss for these indices. ``codes[i]`` belongs to ``slabs[i]``.

    Exact layer loss, all books together: what AQLM (https://arxiv.org/abs/2401.06118) does by Adam.
    """
    flat = torch.cat([book.flatten() for segment in segments for book in _both(segment.books)])

    def unflatten(x: Tensor) -> list[Segment]:
        parts = iter(x.split([book.numel() for segment in segments for book in _both(segment.books)]))
        shaped = []
        for segment in segments:
            books = [next(parts).view_as(book) for book in _both(segment.books)]
            shaped.append(Segment(segment.start, segment.end, Books(books[0], books[1] if len(books) > 1 else None)))
        return shaped

    # One for every slab, segment and book, as `gather` meets them.
    sums = [
        [
            [IndexedSums(index.flatten(), len(book)) for book, index in _used(segment.books, pair)]
            for segment, pair in zip(segments, code, strict=True)
        ]
        for code in codes
    ]

    def gather(gradients: list[Tensor]) -> Tensor:
        """Sums ``[C, rows]`` over the vectors of every centroid: the transpose of a lookup."""
        total = torch.zeros_like(flat)
        for gradient, of_segments in zip(gradients, sums, strict=True):
            parts = []
            for segment, of_books in zip(segments, of_segments, strict=True):
                vectors = as_vectors(gradient[segment.start : segment.end], segment.v).flatten(0, 1)
                parts += [of_book(vectors).flatten() for of_book in of_books]
            total += torch.cat(parts)
        return total

    def lookup(x: Tensor) -> list[Tensor]:
        shaped = unflatten(x)
        return [decode(slab.target.shape[1], shaped, code) for slab, code in zip(slabs, codes, strict=True)]

    mass = gather([slab.mass() for slab in slabs])
    rhs = gather([slab.pull(slab.target - coded) for slab, coded in zip(slabs, lookup(flat), strict=True)])
    change = conjugate_gradient(
        lambda x: gather([slab.pull(coded) for slab, coded in zip(slabs, lookup(x), strict=True)]) + _RIDGE * mass * x,
        rhs,
        mass,
        steps,
    )
    return unflatten(flat + change)


def _both(books: Books) -> list[Tensor]:
    return [books.main] if books.residual is None else [books.main, books.residual]


def _used(books: Books, pair: Codes) -> list[tuple[Tensor, Tensor]]:
    """Books with their indices."""
    return [(book, index) for book, index in zip(_both(books), pair, strict=False) if index is not None]


def fit_norm(slabs: list[Slab], coded: list[Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Factor and offset ``[C]`` for every column so that ``factor * coded + offset`` minimises the loss.

    ``coded[i] [C, rows]`` are the decoded columns of ``slabs[i]``.
    """
    columns = len(slabs[0].target)
    coupled = [q if slab.coupling is None else q @ slab.coupling.matrix for slab, q in zip(slabs, coded, strict=True)]
    sums = [q.sum(1) for q in coupled]
    rows = [s.target.shape[1] if s.coupling is None else float(s.coupling.matrix.sum()) for s in slabs]
    # Half of the normal equations is formed, once: a step then costs what H has elements, not that times the rows.
    gram = torch.zeros_like(slabs[0].moment)
    for slab, q, weighed in zip(slabs, coded, coupled, strict=True):
        gram += (weighed @ q.T).mul_(slab.moment)

    def gather(gradients: list[Tensor]) -> Tensor:
        factor = sum((g * q).sum(1) for g, q in zip(gradients, coded, strict=True))
        return torch.cat([torch.as_tensor(factor), torch.as_tensor(sum(g.sum(1) for g in gradients))])

    def apply(x: Tensor) -> Tensor:
        factor, offset = x[:columns], x[columns:]
        of_factor, of_offset = gram @ factor, torch.zeros_like(offset)
        for slab, total, count in zip(slabs, sums, rows, strict=True):
            pulled = slab.moment @ offset
            of_factor += total * pulled
            of_offset += slab.moment @ (total * factor) + count * pulled
        return torch.cat([of_factor, of_offset])

    mass = sum(slab.moment.diagonal() * count for slab, count in zip(slabs, rows, strict=True))
    diagonal = torch.cat([gram.diagonal(), torch.as_tensor(mass)])
    rhs = gather([slab.pull(slab.target - q) for slab, q in zip(slabs, coded, strict=True)])
    change = conjugate_gradient(lambda x: apply(x) + _RIDGE * diagonal * x, rhs, diagonal, steps)
    return 1 + change[:columns], change[columns:]
