"""The GPU's search for centroids, emulated on the CPU: the same indices as torch finds, however the work is divided."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from quantize import native
from quantize.columns import code_block_torch, sweep_block_torch
from quantize.kmeans import Books, assign_torch
from tests.emulated_cuda import emulated

BOOKS = [(2, 7, 0), (3, 300, 0), (4, 520, 0), (8, 600, 0), (16, 30, 0), (2, 16, 3), (4, 64, 300), (8, 300, 8)]


@pytest.fixture(scope="module", params=[True, False], ids=["rows at once", "column after column"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The search with blocks of columns taken in one launch, and in many."""
    return emulated("assign", tmp_path_factory.mktemp("emulated"), **({} if request.param else {"kFewCentroids": 0}))


@pytest.fixture(params=[1, 40], ids=["few blocks", "many blocks"])
def gpu(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize.native takes every CPU tensor for one on a GPU with this many multiprocessors."""
    processors = request.param

    def scratch(like: Tensor, points: int, candidates: int, residual: Tensor | None) -> tuple:
        keys = torch.empty(2 * candidates * points, dtype=torch.int64)
        return keys, torch.empty(candidates * points * like.shape[-1]), processors, 0, None

    monkeypatch.setattr(native, "_scratch", scratch)
    monkeypatch.setattr(native, "cpu_library", lambda name: library)


def books(v: int, k: int, r: int) -> Books:
    generator = torch.Generator().manual_seed(v + k)
    main = torch.randn(k, v, generator=generator)
    main[k // 2] = main[k // 3]  # a tie, which the lower index wins
    return Books(main, torch.randn(r, v, generator=generator) / 4 if r else None)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize(("v", "k", "r"), BOOKS)
def test_assignment(v: int, k: int, r: int, candidates: int) -> None:
    made, points = books(v, k, r), random(130, v)
    found = native.assign(points, made.main, made.residual, candidates)
    expected = assign_torch(points, made, candidates)
    torch.testing.assert_close(made.decode(*found), made.decode(*expected))
    if not r:
        assert torch.equal(found[0], expected[0])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("v", "k", "r", "candidates", "columns", "rows"),
    # Of one warp, of several, and of eight with the longest lists.
    [
        (4, 300, 0, 2, 4, 3),
        (8, 20, 5, 4, 11, 6),
        (2, 9, 40, 3, 70, 1),
        (3, 520, 70, 4, 3, 2),
        (4, 2048, 30, 8, 2, 1),
        (16, 30, 70, 9, 3, 3),
    ],
)
def test_blocks(v: int, k: int, r: int, candidates: int, columns: int, rows: int) -> None:
    made = books(v, k, r)
    block, matrix = random(columns, rows, v), (random(columns, columns) / 5 + 2 * torch.eye(columns)).triu()
    for ours, torchs in ((native.code_block, code_block_torch), (native.sweep_block, sweep_block_torch)):
        one, two = (
            (start.clone(), (start % r).clone() if r else None)
            for start in [torch.arange(columns * rows).view(columns, rows) % k] * 2
        )
        found = ours(block.clone(), matrix, made.main, made.residual, candidates, one)
        expected = torchs(block, matrix, made, candidates, *two)
        torch.testing.assert_close(found, expected)
        assert torch.equal(one[0], two[0])
        if one[1] is not None:
            assert torch.equal(one[1], two[1])


@pytest.mark.usefixtures("gpu")
def test_points_that_are_not_numbers_stay_in_bounds() -> None:
    made, points = books(4, 20, 6), torch.full((5, 4), torch.nan)
    main, residual = native.assign(points, made.main, made.residual, 3)
    assert residual is not None and main.min() >= 0 and main.max() < 20 and residual.min() >= 0 and residual.max() < 6
