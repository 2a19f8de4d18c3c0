"""Refinement: coordinate descent over indices, least squares for books and norms, against brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize import columns as column_steps
from quantize.columns import Codes, Segment, loss, sweep, walk
from quantize.kmeans import Books
from quantize.refine import conjugate_gradient, fit_books, fit_norm
from quantize.slab import Slab
from tests.strategies import few


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_slab(seed: int, count: int, rows: int) -> Slab:
    gen = generator(seed)
    x = torch.randn(4 * count, count, generator=gen) @ torch.randn(count, count, generator=gen)
    return Slab(torch.randn(count, rows, generator=gen), x.T @ x / len(x) + 0.1 * torch.eye(count))


def random_books(seed: int, v: int, k: int, r: int) -> Books:
    gen = generator(seed + 100)
    return Books(torch.randn(k, v, generator=gen), 0.4 * torch.randn(r, v, generator=gen) if r else None)


@few(20)
@given(seed=st.integers(0, 1 << 20), n=st.integers(1, 30))
def test_conjugate_gradient_solves(seed: int, n: int) -> None:
    x = torch.randn(2 * n, n, generator=generator(seed), dtype=torch.float64)
    matrix, rhs = x.T @ x + torch.eye(n), torch.randn(n, generator=generator(seed + 1), dtype=torch.float64)
    found = conjugate_gradient(lambda p: matrix @ p, rhs, matrix.diagonal(), 3 * n)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, rhs), rtol=1e-3, atol=1e-3)


def test_each_conjugate_gradient_step_helps() -> None:
    x = torch.randn(60, 40, generator=generator(0))
    matrix, rhs = x.T @ x, torch.randn(40, generator=generator(1))

    def value(steps: int) -> float:
        found = conjugate_gradient(lambda p: matrix @ p, rhs, matrix.diagonal(), steps)
        return float(found @ matrix @ found / 2 - rhs @ found)

    assert all(more < fewer for fewer, more in pairwise([value(n) for n in (0, 1, 2, 5, 10, 20)]))


@few(25)
@given(
    seed=st.integers(0, 1 << 20),
    count=st.sampled_from([1, 7, 130]),
    rows=st.sampled_from([1, 5, 12]),
    v=st.integers(2, 6),
    r=st.sampled_from([0, 4]),
)
def test_a_sweep_never_raises_the_loss_and_finds_an_optimum(seed: int, count: int, rows: int, v: int, r: int) -> None:
    slab, segments = random_slab(seed, count, rows - rows % v or v), [Segment(0, count, random_books(seed, v, 16, r))]
    codes = walk(slab, segments, 16)
    losses = [loss(slab, segments, codes)]
    for _ in range(30):
        codes = sweep(slab, segments, codes, 16)
        losses.append(loss(slab, segments, codes))
    assert all(after <= before * (1 + 1e-4) + 1e-4 for before, after in pairwise(losses))
    # No single column of any vector can do better: tried with every pair of centroids.
    index, residual = codes[0]
    main, second = segments[0].books.main, segments[0].books.residual
    for j in {0, count // 2, count - 1}:
        for a in range(len(main)):
            for b in range(r or 1):
                changed = index.clone(), None if residual is None else residual.clone()
                changed[0][j, 0] = a
                if changed[1] is not None:
                    changed[1][j, 0] = b
                assert loss(slab, segments, [changed]) >= losses[-1] * (1 - 1e-3) - 1e-3
    assert second is None or len(second) == r


def test_a_sweep_uses_each_segment_s_own_books() -> None:
    slab = random_slab(3, 40, 12)
    segments = [Segment(0, 10, random_books(1, 2, 16, 0)), Segment(10, 40, random_books(2, 4, 16, 8))]
    codes = walk(slab, segments, 4)
    assert [tuple(index.shape) for index, _ in codes] == [(10, 6), (30, 3)]
    before = loss(slab, segments, codes)
    assert loss(slab, segments, sweep(slab, segments, codes, 4)) < before


@few(25)
@given(
    seed=st.integers(0, 1 << 20),
    rows=st.sampled_from([1, 30]),
    count=st.sampled_from([1, 17]),
    r=st.sampled_from([0, 8]),
)
def test_native_sweep_equals_torch(seed: int, rows: int, count: int, r: int) -> None:
    books, gen = random_books(seed, 4, 32, r), generator(seed)
    aim = torch.randn(count, rows, 4, generator=gen)
    pull = 0.1 * torch.randn(count, count, generator=gen)
    results = []
    for function in (column_steps._sweep_block_native, column_steps.sweep_block_torch):
        index = torch.randint(32, (count, rows), generator=generator(seed + 1))
        residual = torch.randint(8, (count, rows), generator=generator(seed + 2)) if r else None
        moves = function(aim, pull, books, 4, index, residual)
        results.append((index, moves))
    alike = (results[0][0] == results[1][0]).all(0)  # a tie broken differently changes the rest of its row
    assert alike.float().mean() > 0.8 or rows == 1
    torch.testing.assert_close(results[0][1][:, alike], results[1][1][:, alike], rtol=1e-4, atol=1e-4)


def one_hot(segment: Segment, codes: Codes, rows: int) -> Tensor:
    """The lookup of vectors as a matrix ``[C * R, k + r]``, float64."""
    index, residual = codes
    k, r = len(segment.books.main), 0 if segment.books.residual is None else len(segment.books.residual)
    matrix = torch.zeros(index.numel(), k + r, dtype=torch.float64)
    matrix[torch.arange(index.numel()), index.flatten()] = 1
    if residual is not None:
        matrix[torch.arange(index.numel()), k + residual.flatten()] += 1
    return matrix


@pytest.mark.parametrize("r", [0, 6])
def test_fitted_books_are_the_least_squares_solution(r: int) -> None:
    """Against the normal equations, written out in float64 for each element of the vectors."""
    count, v, vectors = 20, 3, 7
    slabs = [random_slab(seed, count, v * vectors) for seed in (1, 2)]
    segment = Segment(0, count, random_books(1, v, 12, r))
    codes = [walk(slab, [segment], 4) for slab in slabs]
    (fitted,) = fit_books(slabs, [segment], codes, 200)
    lookups = [one_hot(segment, code[0], v * vectors) for code in codes]
    size = lookups[0].shape[1]
    normal, rhs = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, v, dtype=torch.float64)
    for slab, lookup in zip(slabs, lookups, strict=True):
        weight = torch.kron(slab.moment.double(), torch.eye(vectors, dtype=torch.float64))
        normal += lookup.T @ weight @ lookup
        rhs += lookup.T @ weight @ slab.target.double().view(count * vectors, v)
    best = torch.linalg.lstsq(normal, rhs, driver="gelsd").solution

    def total(books: Tensor) -> float:
        return sum(
            slab.loss(slab.target - (lookup @ books).view(count, v * vectors).float())
            for slab, lookup in zip(slabs, lookups, strict=True)
        )

    found = torch.cat([b for b in (fitted.books.main, fitted.books.residual) if b is not None]).double()
    before = sum(loss(slab, [segment], code) for slab, code in zip(slabs, codes, strict=True))
    assert total(found) < 0.9 * before
    assert total(found) == pytest.approx(total(best), rel=0.02)


def test_centroids_that_nobody_uses_stay() -> None:
    slab, books = random_slab(1, 20, 12), random_books(1, 4, 16, 0)
    books.main[5] = 1000.0
    codes = walk(slab, [Segment(0, 20, books)], 1)
    (fitted,) = fit_books([slab], [Segment(0, 20, books)], [codes], 10)
    assert not (codes[0][0] == 5).any() and torch.equal(fitted.books.main[5], books.main[5])


def test_a_fitted_norm_finds_what_was_done_to_the_columns() -> None:
    coded = torch.randn(15, 40, generator=generator(0))
    factor, offset = 1 + 0.3 * torch.randn(15, generator=generator(1)), torch.randn(15, generator=generator(2))
    slab = Slab(factor[:, None] * coded + offset[:, None], random_slab(4, 15, 1).moment)
    found = fit_norm([slab], [coded], 300)
    torch.testing.assert_close(found[0], factor, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[1], offset, rtol=0.02, atol=0.02)
