"""Coupled output rows: the choices that make up for errors on both sides, and least squares in their loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize.columns import Segment, decode, loss, walk
from quantize.coupled import sweep_coupled, walk_coupled
from quantize.kmeans import Books
from quantize.recipe import LayerRecipe, Recipe
from quantize.refine import fit_books, fit_norm
from quantize.slab import Coupling, Slab
from quantize.solver import relative_error, solve
from tests.strategies import few


def correlated(count: int, seed: int, spread: float = 0.1) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * count, count // 4 + 1, generator=gen) @ torch.randn(count // 4 + 1, count, generator=gen)
    x += spread * torch.randn(x.shape, generator=gen)
    return x.T @ x / len(x)


def random_slab(rows: int, columns: int, unit: int, coupled: bool = True, seed: int = 0) -> Slab:
    target = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed))
    coupling = Coupling.of(correlated(rows, seed + 1), 0.01, unit) if coupled else None
    return Slab(target, correlated(columns, seed + 2) + 0.1 * torch.eye(columns), coupling)


def random_segments(columns: int, v: int, r: int, cut: int = 0) -> list[Segment]:
    """One pair of books for all columns, or an outlier book of single vectors of 2 before it."""
    gen = torch.Generator().manual_seed(7)
    books = Books(torch.randn(32, v, generator=gen), 0.4 * torch.randn(r, v, generator=gen) if r else None)
    outliers = [Segment(0, cut, Books(torch.randn(16, 2, generator=gen), None))] if cut else []
    return [*outliers, Segment(cut, columns, books)]


@few(60)
@given(rows=st.integers(1, 200), unit=st.integers(1, 24))
def test_groups_keep_vectors_whole(rows: int, unit: int) -> None:
    coupling = Coupling.of(correlated(rows, 1), 0.01, unit)
    assert coupling.order.sort().values.tolist() == list(range(rows))
    assert coupling.groups[0].start == 0 and coupling.groups[-1].stop == rows
    assert all(a.stop == b.start for a, b in zip(coupling.groups, coupling.groups[1:], strict=False))
    for group in coupling.groups:
        own = coupling.order[group]
        whole = own[: len(own) // unit * unit].view(-1, unit)
        assert (whole[:, 0] % unit == 0).all() and (whole.diff(dim=1) == 1).all()
    assert float(coupling.matrix.diagonal().mean()) == pytest.approx(1, rel=1e-4)


def test_the_loss_is_that_of_both_factors() -> None:
    slab = random_slab(12, 10, 2)
    assert slab.coupling is not None
    error = torch.randn(10, 12, generator=torch.Generator().manual_seed(5))
    both = torch.kron(slab.moment.double(), slab.coupling.matrix.double())
    flat = error.double().flatten()
    assert slab.loss(error) == pytest.approx(float(flat @ both @ flat), rel=1e-4)
    pulled = (both @ flat).view(10, 12)
    torch.testing.assert_close(slab.pull(error).double(), pulled, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slab.mass().double().flatten(), both.diagonal(), rtol=1e-5, atol=1e-6)


def test_row_weights_are_what_is_left_when_later_groups_make_up() -> None:
    """The Schur complement of a group against all later ones, in float64."""
    coupling = Coupling.of(correlated(40, 1), 0.01, 2)
    matrix, found = coupling.matrix.double(), coupling.row_weights()
    for group in coupling.groups:
        own, later = coupling.order[group], coupling.order[group.stop :]
        cross = matrix[own][:, later]
        left = matrix[own][:, own] - cross @ torch.linalg.solve(matrix[later][:, later], cross.T)
        torch.testing.assert_close(found[own].double(), left.diagonal(), rtol=2e-3, atol=1e-5)


def test_rows_that_are_not_coupled_are_coded_as_by_the_walk() -> None:
    slab, segments = random_slab(36, 30, 4, coupled=False), random_segments(30, 4, 8)
    alone = Slab(slab.target, slab.moment, Coupling.of(torch.eye(36), 0.01, 4))
    plain = walk(slab, segments, 4)
    for one, two in zip(plain[0], walk_coupled(alone, segments, 4)[0], strict=True):
        assert one is not None and two is not None and float((one == two).float().mean()) > 0.99


@pytest.mark.parametrize(("rows", "cut", "r"), [(64, 0, 0), (61, 0, 8), (62, 6, 8)])
def test_coupled_choices_lower_the_coupled_loss(rows: int, cut: int, r: int) -> None:
    slab, segments = random_slab(rows, 40, 4), random_segments(40, 4, r, cut)
    plain = loss(slab, segments, walk(slab, segments, 4))
    codes = walk_coupled(slab, segments, 4)
    walked = loss(slab, segments, codes)
    assert walked < 0.9 * plain
    swept = loss(slab, segments, sweep_coupled(slab, segments, codes, 4))
    assert swept < walked
    again = walk_coupled(slab, segments, 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(codes, again, strict=True))


def test_least_squares_in_the_coupled_loss() -> None:
    """At the minimum the gradient vanishes: against autograd in float64, for books and for the norm."""
    slab, segments = random_slab(32, 20, 4), random_segments(20, 4, 8)
    assert slab.coupling is not None
    codes = walk_coupled(slab, segments, 4)
    moment, rows, target = slab.moment.double(), slab.coupling.matrix.double(), slab.target.double()

    def gradients(coded: Tensor, *of: Tensor) -> Tensor:
        error = target - coded
        found = torch.autograd.grad((moment @ error @ rows * error).sum(), of)
        return torch.cat([g.flatten() for g in found])

    def of_books(books: Books) -> Tensor:
        assert books.residual is not None
        leaves = [book.double().requires_grad_() for book in (books.main, books.residual)]
        return gradients(decode(32, [Segment(0, 20, Books(leaves[0], leaves[1]))], codes), *leaves)

    fitted = fit_books([slab], segments, [codes], 300)
    assert of_books(fitted[0].books).norm() < 0.02 * of_books(segments[0].books).norm()
    assert loss(slab, fitted, codes) < loss(slab, segments, codes)

    coded = decode(32, segments, codes)

    def of_norm(factor: Tensor, offset: Tensor) -> Tensor:
        leaves = [part.double().requires_grad_() for part in (factor, offset)]
        return gradients(coded.double() * leaves[0][:, None] + leaves[1][:, None], *leaves)

    found = fit_norm([slab], [coded], 300)
    assert of_norm(*found).norm() < 0.02 * of_norm(torch.ones(20), torch.zeros(20)).norm()


@pytest.mark.parametrize(
    "update", [{}, {"outliers": 8, "outlier_vector_length": 2, "outlier_centroids": 16, "perm": True}], ids=str
)
def test_a_coded_layer_errs_where_the_loss_feels_it_less(update: dict) -> None:
    gen = torch.Generator().manual_seed(0)
    weight, moment, curvature = torch.randn(66, 48, generator=gen), correlated(48, 1), correlated(66, 2)
    layer = LayerRecipe(**{"vector_length": 4, "centroids": 16, "residual_centroids": 0} | update)
    recipe = Recipe(rounds=2)
    plain = solve(weight, moment, layer, recipe, torch.float16)
    found = solve(weight, moment, layer, recipe, torch.float16, curvature)
    whole = [slice(0, 66)]
    assert found.error < 0.7 * relative_error(weight, plain.weight, moment[None], whole, curvature)
    assert list(found.steps.values())[-1] < found.steps["walk"]
    again = solve(weight, moment, layer, recipe, torch.float16, curvature)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in found.tensors.items())
