"""One layer: second moments, the inverse factor, and the coding with error feedback."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize import solver
from quantize.errors import QuantizeError
from quantize.hessian import SecondMoment, damp, inverse_factor
from quantize.kmeans import nearest
from quantize.recipe import PRESETS, LayerRecipe, Recipe
from quantize.solver import Solution, row_groups, solve
from tests.strategies import few
from vllm_vptq.format import as_index, dequantize, validate

ROOT = Path(__file__).parents[1]


def layer(v: int = 4, k: int = 16, r: int = 8, **more: Any) -> LayerRecipe:
    return LayerRecipe(vector_length=v, centroids=k, residual_centroids=r, **more)


PLAIN = layer(norm=False, perm=False)
RECIPE = Recipe(iterations=4)


def random_weight(out: int, cols: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(out, cols, generator=torch.Generator().manual_seed(seed))


def correlated_moment(cols: int, seed: int = 0, tokens: int = 500) -> Tensor:
    """Inputs with a few strong common directions, and columns of very different size."""
    gen = torch.Generator().manual_seed(seed + 1)
    rank = max(1, cols // 6)
    common = torch.randn(tokens, rank, generator=gen) @ torch.randn(rank, cols, generator=gen)
    size = torch.randn(cols, generator=gen).exp()
    x = (common + 0.3 * torch.randn(tokens, cols, generator=gen)) * size
    return x.T @ x / tokens


def relative_error(weight: Tensor, result: Tensor, moment: Tensor) -> float:
    w, q, h = weight.double(), result.double(), moment.double()
    e = w - q
    return float(torch.trace(e @ h @ e.T) / torch.trace(w @ h @ w.T))


def check(solution: Solution, weight: Tensor, moment: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """What holds of every solution: the format's rules, its weight, its storage, its error."""
    validate("layer", solution.tensors, solution.spec)
    assert solution.spec.shape == tuple(weight.shape)
    assert torch.equal(dequantize(solution.tensors, solution.spec), solution.weight.cpu())
    assert torch.isfinite(solution.weight).all()
    for name, tensor in solution.tensors.items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        if name.endswith(".weight") or name in ("weight_scale", "weight_bias"):
            assert tensor.dtype == dtype
    # Cancellation in tr(W H W^T) aside, float32 gives it to a few digits.
    expected = relative_error(weight, solution.weight, moment)
    assert solution.error == pytest.approx(expected, rel=2e-3, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------
# Solutions


@few(40)
@given(
    out=st.integers(1, 37),
    cols=st.sampled_from([1, 2, 31, 127, 128, 129, 260]),
    v=st.integers(2, 16),
    k=st.sampled_from([2, 8, 64]),
    r=st.sampled_from([0, 2, 16, 128]),
    norm=st.booleans(),
    perm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_solutions_are_what_they_say(
    out: int, cols: int, v: int, k: int, r: int, norm: bool, perm: bool, dtype: torch.dtype
) -> None:
    weight, moment = random_weight(out, cols).to(dtype), correlated_moment(cols, tokens=100)
    spec = layer(v, k, r, norm=norm, perm=perm)
    solution = solve(weight, moment, spec, Recipe(iterations=2), dtype)
    assert solution.spec == spec.spec(out, cols)
    check(solution, weight, moment, dtype)
    assert ("perm" in solution.tensors) == perm
    assert ("weight_scale" in solution.tensors) == ("weight_bias" in solution.tensors) == norm
    assert ("res_centroids.weight" in solution.tensors) == bool(r)


@pytest.mark.parametrize("spec", [layer(), layer(r=0), PLAIN, layer(norm=False), layer(perm=True)], ids=str)
def test_the_same_arguments_give_the_same_bits(spec: LayerRecipe) -> None:
    weight, moment = random_weight(30, 150), correlated_moment(150)
    one, two = (solve(weight.clone(), moment.clone(), spec, RECIPE, torch.bfloat16) for _ in range(2))
    assert one.tensors.keys() == two.tensors.keys() and one.error == two.error
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_the_seed_matters_and_the_global_one_does_not() -> None:
    weight, moment = random_weight(30, 150), correlated_moment(150)
    books = []
    for seed, noise in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(noise)
        books.append(solve(weight, moment, layer(), RECIPE.model_copy(update={"seed": seed}), torch.float32).tensors)
    assert torch.equal(books[0]["indices"], books[1]["indices"])
    assert not torch.equal(books[0]["indices"], books[2]["indices"])


def test_the_arguments_are_left_alone() -> None:
    weight, moment = random_weight(30, 150), correlated_moment(150)
    moment[3] = moment[:, 3] = 0
    before = weight.clone(), moment.clone()
    solve(weight, moment, layer(), RECIPE, torch.float32)
    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])


@pytest.mark.parametrize("cols", [96, 300])
@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("r", [0, 8])
def test_error_feedback_beats_plain_assignment(cols: int, perm: bool, r: int) -> None:
    """Same books, same weights: only who is chosen differs. 300 columns are three blocks."""
    weight, moment = random_weight(64, cols), correlated_moment(cols)
    spec = layer(4, 16, r, norm=False, perm=perm)
    fed = solve(weight, moment, spec, RECIPE, torch.float32)
    book = fed.tensors["centroids.weight"].view(-1, 4)
    if r:
        book = (book[:, None] + fed.tensors["res_centroids.weight"].view(-1, 4)).flatten(0, 1)
    vectors = weight.view(16, 4, cols).transpose(1, 2).reshape(-1, 4)
    plain = book[nearest(vectors, book)].view(16, cols, 4).transpose(1, 2).reshape(64, cols)
    assert (plain - weight).square().sum() < (fed.weight - weight).square().sum()  # it is the better plain one ...
    assert fed.error < 0.7 * relative_error(weight, plain, moment)  # ... and the worse where it counts


def test_feedback_without_correlation_is_plain_assignment() -> None:
    weight, spec = random_weight(32, 200), layer(4, 16, 0, norm=False, perm=False)
    solution = solve(weight, torch.eye(200), spec, RECIPE, torch.float32)
    book = solution.tensors["centroids.weight"].view(-1, 4)
    vectors = weight.view(8, 4, 200).transpose(1, 2)
    plain = book[nearest(vectors.reshape(-1, 4), book)].view(8, 200, 4)
    torch.testing.assert_close(solution.weight.view(8, 4, 200).transpose(1, 2), plain)


def test_every_part_helps() -> None:
    weight = random_weight(64, 128) * torch.randn(128).exp() + 0.05 * torch.randn(128)
    moment = correlated_moment(128)
    error = {
        name: solve(weight, moment, spec, RECIPE, torch.float32).error
        for name, spec in {
            "all": layer(4, 32, 16),
            "no norm": layer(4, 32, 16, norm=False),
            "no perm": layer(4, 32, 16, perm=False),
            "no residual": layer(4, 32, 0),
            "more": layer(2, 128, 128),
        }.items()
    }
    assert error["all"] < error["no norm"] and error["all"] < error["no residual"]
    assert error["all"] < 1.2 * error["no perm"]
    assert error["more"] < 0.01 * error["all"] and error["more"] < 1e-3


def test_perm_puts_the_important_columns_first() -> None:
    weight, diagonal = random_weight(16, 300), 1.0 + torch.arange(300).roll(77)
    solution = solve(weight, torch.diag(diagonal), layer(norm=False, perm=True), RECIPE, torch.float32)
    assert torch.equal(as_index(solution.tensors["perm"]), diagonal.argsort(descending=True))


def test_rows_that_do_not_fill_a_vector() -> None:
    weight, moment = random_weight(13, 64), correlated_moment(64)
    solution = solve(weight, moment, layer(8, 64, 64), RECIPE, torch.float32)
    assert solution.tensors["indices"].shape[1] == 2
    check(solution, weight, moment)
    assert solution.error < 0.1


@few(30)
@given(
    out=st.sampled_from([12, 29, 64]),
    v=st.sampled_from([2, 3, 4]),
    r=st.sampled_from([0, 8]),
    groups=st.sampled_from([1, 4]),
    outliers=st.sampled_from([0, 4]),
    v0=st.sampled_from([2, 5]),
    perm=st.booleans(),
    moments=st.sampled_from([1, 3]),
    algorithm=st.sampled_from(["joint", "vptq"]),
)
def test_groups_outliers_and_row_groups(
    out: int, v: int, r: int, groups: int, outliers: int, v0: int, perm: bool, moments: int, algorithm: str
) -> None:
    weight = random_weight(out, 132)
    made = LayerRecipe(
        vector_length=v,
        centroids=16,
        residual_centroids=r,
        groups=groups,
        outliers=outliers,
        outlier_vector_length=v0,
        outlier_centroids=32,
        perm=perm,
    )
    spec = made.spec(out, 132)
    parts = row_groups(out, moments, spec)
    stacked = torch.stack([correlated_moment(132, seed) for seed in range(len(parts))])
    recipe = Recipe(iterations=3, rounds=1, algorithm=algorithm)
    solution = solve(weight, stacked, made, recipe, torch.float32)
    validate("layer", solution.tensors, solution.spec)
    assert torch.equal(dequantize(solution.tensors, solution.spec), solution.weight)
    missed = [(weight[rows] - solution.weight[rows]).double() for rows in parts]
    loss = sum(torch.trace(e @ h.double() @ e.T) for e, h in zip(missed, stacked, strict=True))
    whole = sum(
        torch.trace(weight[rows].double() @ h.double() @ weight[rows].double().T)
        for rows, h in zip(parts, stacked, strict=True)
    )
    assert solution.error == pytest.approx(float(loss / whole), rel=2e-3)
    assert solution.error < 0.8


@few(100)
@given(out=st.integers(1, 500), count=st.integers(1, 9), v=st.integers(2, 16), v0=st.integers(2, 16))
def test_row_groups_cut_no_vector(out: int, count: int, v: int, v0: int) -> None:
    spec = LayerRecipe(vector_length=v, outliers=1, outlier_vector_length=v0).spec(out, 10)
    parts = row_groups(out, count, spec)
    assert 1 <= len(parts) <= count and parts[0].start == 0 and parts[-1].stop == out
    assert all(a.stop == b.start and b.start % v == b.start % v0 == 0 for a, b in pairwise(parts))


def test_row_groups_with_one_moment_are_no_groups() -> None:
    weight, moment = random_weight(32, 100), correlated_moment(100)
    one = solve(weight, moment, layer(), RECIPE, torch.float32)
    two = solve(weight, torch.stack([moment, moment]), layer(), RECIPE, torch.float32)
    assert two.error == pytest.approx(one.error, rel=0.25)


def test_each_row_group_follows_its_own_moment() -> None:
    weight = random_weight(64, 100)
    own = torch.stack([correlated_moment(100, 1), correlated_moment(100, 2)])
    halves = [weight[:32], weight[32:]]

    def loss(result: Tensor) -> float:
        pairs = zip(halves, (result[:32], result[32:]), own, strict=True)
        return sum(float(torch.trace((w - q) @ h @ (w - q).T)) for w, q, h in pairs)

    guided = solve(weight, own, layer(), RECIPE, torch.float32)
    plain = solve(weight, own.mean(0), layer(), RECIPE, torch.float32)
    assert loss(guided.weight) < 0.9 * loss(plain.weight)


@pytest.mark.parametrize("r", [0, 16])
def test_our_order_of_steps_beats_vptq_s(r: int) -> None:
    weight, moment, spec = random_weight(128, 200), correlated_moment(200), layer(4, 32, r)
    ours = solve(weight, moment, spec, Recipe(), torch.float16)
    theirs = solve(weight, moment, spec, Recipe(**PRESETS["paper"]), torch.float16)
    assert ours.error < 0.9 * theirs.error
    assert list(theirs.steps) == ["walk"]


def test_every_round_helps() -> None:
    weight, moment = random_weight(128, 200), correlated_moment(200)
    steps = list(solve(weight, moment, layer(), Recipe(rounds=5), torch.float32).steps.values())
    assert len(steps) == 6 and all(after < before for before, after in pairwise(steps))
    assert steps[-1] < 0.9 * steps[0]


# ---------------------------------------------------------------------------------------------------------------
# Degenerate layers


@pytest.mark.parametrize("spec", [layer(), layer(norm=False), layer(perm=True), PLAIN], ids=str)
def test_dead_columns(spec: LayerRecipe) -> None:
    """Inputs that never fire: whatever their weights, the rest is coded as if they were not there."""
    weight, moment = random_weight(64, 128), correlated_moment(128)
    dead = torch.arange(0, 128, 3)
    moment[dead] = 0
    moment[:, dead] = 0
    wild = weight.clone()
    wild[:, dead] = 1000 * torch.randn(64, len(dead), generator=torch.Generator().manual_seed(9))
    plain, wilder = (solve(w, moment, spec, RECIPE, torch.float32) for w in (weight, wild))
    check(plain, weight, moment)
    check(wilder, wild, moment)
    assert wilder.error == pytest.approx(plain.error, rel=0.05)
    alive = torch.tensor([c for c in range(128) if c % 3])
    alone = solve(weight[:, alive], moment[alive][:, alive], spec, RECIPE, torch.float32)
    assert plain.error < 1.3 * alone.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_columns_are_coded_well(dtype: torch.dtype) -> None:
    weight, moment = random_weight(32, 64), correlated_moment(64)
    weight[:, 5] = 0.3
    weight[:, 6] = 0.0
    weight[:, 7] = -7.0
    weight = weight.to(dtype)
    solution = solve(weight, moment, layer(4, 64, 64), RECIPE, dtype)
    check(solution, weight, moment, dtype)
    spread = 4 * (weight.float()[:, 8:] - solution.weight[:, 8:]).abs().max()
    assert (weight.float()[:, 5:8] - solution.weight[:, 5:8]).abs().max() < max(spread, 0.01)


@pytest.mark.parametrize("spec", [layer(), layer(r=0), PLAIN], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_of_zeros_stays_zero(spec: LayerRecipe, dtype: torch.dtype) -> None:
    weight, moment = torch.zeros(16, 40, dtype=dtype), correlated_moment(40)
    solution = solve(weight, moment, spec, RECIPE, dtype)
    validate("layer", solution.tensors, solution.spec)
    assert solution.weight.abs().max() == 0 and solution.error == 0


@pytest.mark.parametrize("spec", [layer(), PLAIN], ids=str)
def test_inputs_that_are_all_zero(spec: LayerRecipe) -> None:
    """A layer no calibration text excites is coded somehow or refused in one line."""
    try:
        solution = solve(random_weight(16, 40), torch.zeros(40, 40), spec, RECIPE, torch.float32)
    except QuantizeError as error:
        assert len(str(error).splitlines()) == 1
    else:
        validate("layer", solution.tensors, solution.spec)
        assert solution.error == 0


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("moment_scale", [1e-8, 1e8])
def test_the_error_does_not_depend_on_the_units(scale: float, moment_scale: float) -> None:
    weight, moment = random_weight(32, 100), correlated_moment(100)
    expected = solve(weight, moment, layer(), RECIPE, torch.float32).error
    found = solve(weight * scale, moment * moment_scale, layer(), RECIPE, torch.float32).error
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_dtype_costs_little(dtype: torch.dtype) -> None:
    weight, moment = random_weight(64, 100).to(dtype), correlated_moment(100)
    exact = solve(weight, moment, layer(4, 64, 64), RECIPE, torch.float32)
    rounded = solve(weight, moment, layer(4, 64, 64), RECIPE, dtype)
    check(rounded, weight, moment, dtype)
    assert rounded.error < 1.2 * exact.error


@pytest.mark.parametrize("columns", [32769, 40000, 65536])
def test_an_order_of_more_than_32768_columns_survives_16_bits(columns: int) -> None:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    stored = solver.stored_order(order)
    assert stored.dtype == torch.int16 and torch.equal(as_index(stored), order)


# ---------------------------------------------------------------------------------------------------------------
# Second moments


@few(25)
@given(
    parts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    cols=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_second_moment_is_the_mean_of_outer_products(parts: list[int], cols: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(sum(parts) + cols)
    batches = [3 * torch.randn(2, n, cols, generator=gen).to(dtype) for n in parts]
    moment = SecondMoment(cols, torch.device("cpu"))
    for batch in batches:
        moment.add(batch)
    x = torch.cat(batches, 1).reshape(-1, cols).double()
    assert moment.tokens == len(x)
    assert moment.mean().dtype == torch.float32
    torch.testing.assert_close(moment.mean().double(), x.T @ x / len(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    moment = SecondMoment(4, torch.device("cpu"))
    moment.add(torch.tensor([[1.0, 2.0, bad, 4.0]]))
    with pytest.raises(QuantizeError, match=r"\A.*not finite.*\Z"):
        moment.mean()


def test_a_moment_of_nothing_is_refused() -> None:
    with pytest.raises(QuantizeError, match="no calibration token"):
        SecondMoment(4, torch.device("cpu")).mean()


@pytest.mark.parametrize("cols", [1, 2, 33, 200])
def test_inverse_factor(cols: int) -> None:
    moment = correlated_moment(cols, tokens=2000) + torch.eye(cols)
    upper = inverse_factor(moment)
    assert upper.is_contiguous() and upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    inverse = torch.linalg.inv(moment.double())
    scale = inverse.diagonal().sqrt()
    difference = (upper.double().T @ upper.double() - inverse) / scale[:, None] / scale[None, :]
    assert difference.abs().max() < 1e-3


def test_damping_is_relative_to_the_mean_and_finds_dead_columns() -> None:
    moment = correlated_moment(30)
    moment[4] = moment[:, 4] = 0
    mean = moment.diagonal().mean()
    damped, dead = damp(moment, 0.05)
    assert dead.nonzero().flatten().tolist() == [4]
    extra = (damped - moment).diagonal()
    torch.testing.assert_close(damped - torch.diag(damped.diagonal()), moment - torch.diag(moment.diagonal()))
    torch.testing.assert_close(extra[:4], (0.05 * mean).expand(4), rtol=1e-3, atol=1e-4)
    assert damped[4, 4] == mean


@pytest.mark.parametrize("rank", [1, 5])
def test_rank_deficient_moments_are_rescued(rank: int) -> None:
    x = 100 * torch.randn(rank, 60, generator=torch.Generator().manual_seed(rank))
    moment = x.T @ x / rank
    upper = inverse_factor(moment)  # with no damping but its own
    assert torch.isfinite(upper).all() and (upper.diagonal() > 0).all() and torch.equal(upper, upper.triu())
    weight = random_weight(16, 60)
    solution = solve(weight, moment, layer(), RECIPE, torch.float32)
    check(solution, weight, moment)
    assert solution.error < 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_factor_of_what_is_not_finite_is_refused(bad: float) -> None:
    moment = torch.eye(8)
    moment[5, 2] = moment[2, 5] = bad
    with pytest.raises(QuantizeError):
        inverse_factor(moment)


@pytest.mark.parametrize(("bad", "norm"), [("nan", True), ("-inf", False)])
def test_a_weight_that_is_not_finite_is_refused(bad: str, norm: bool) -> None:
    """In a process of its own: it must not take pytest with it."""
    script = f"""
import torch
from quantize.errors import QuantizeError
from quantize.recipe import PRESETS, LayerRecipe, Recipe
from quantize.solver import solve
weight = torch.randn(16, 32)
weight[3, 7] = float("{bad}")
try:
    solve(weight, torch.eye(32), LayerRecipe(centroids=16, residual_centroids=8, norm={norm}), Recipe(), torch.float32)
except QuantizeError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-300:]}"
    assert done.stdout.startswith("refused: ") and len(done.stdout.splitlines()) == 1
