"""The GPU's code for coded layers, emulated on the CPU: weights and gradients as torch has them."""

from __future__ import annotations

import ctypes

import pytest
import torch

from quantize import coded, native
from quantize.coded import CodedLinear
from quantize.sums import IndexedSums
from tests.emulated_cuda import emulated
from tests.random_coded import LAYERS, random_layer, trained_once


class Sorted(IndexedSums):
    """As on a GPU."""

    def __init__(self, index: torch.Tensor, count: int) -> None:
        super().__init__(index, count)
        self._sort()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._by_pieces(rows)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated("coded", tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def compiled(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize.native takes CPU tensors for those of a GPU; indices are sorted as there."""
    monkeypatch.setattr(native, "decodes", lambda device: True)
    monkeypatch.setattr(native, "_place", lambda like: (0, None))
    monkeypatch.setattr(native, "cpu_library", lambda name: library)
    monkeypatch.setattr(coded, "IndexedSums", Sorted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_products_and_gradients(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    tensors, spec = random_layer(LAYERS[name], 157, 136)
    expected, theirs = trained_once(tensors, spec, dtype)
    request.getfixturevalue("compiled")
    found, ours = trained_once(tensors, spec, dtype)
    # The weight's gradient is rounded to the product's type by both.
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(found, expected, **close)
    assert ours.keys() == theirs.keys() and len(ours) >= 3
    for key in ours:
        scale = theirs[key].abs().max().clamp_min(1e-6)
        torch.testing.assert_close(
            ours[key] / scale, theirs[key] / scale, **close, msg=lambda said, key=key: f"{key}: {said}"
        )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["v2", "v5", "v8", "v16", "groups", "outliers"])
def test_weights(name: str) -> None:
    tensors, spec = random_layer(LAYERS[name], 45, 300 if name == "v8" else 40)
    linear = CodedLinear(tensors, spec, None)
    exact = linear.weight().detach()
    torch.testing.assert_close(linear.decoded(torch.float32), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(linear.decoded(torch.bfloat16), exact.bfloat16(), rtol=2**-7, atol=1e-6)
    # Halfway cases and what is not finite, as torch rounds them.
    if name == "v8":
        values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, torch.inf, -torch.inf, torch.nan, 0.0])
        with torch.no_grad():
            linear.centroids.copy_(values.repeat(spec.num_centroids)[None])
            linear.weight_scale.fill_(1)
            linear.weight_bias.fill_(0)
        rounded = linear.decoded(torch.bfloat16)
        torch.testing.assert_close(rounded, linear.weight().bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("n", "count"), [(0, 4), (1, 1), (63, 1), (65, 1), (5000, 1), (5000, 3), (700, 900)])
@pytest.mark.parametrize("width", [3, 17])
def test_sums(n: int, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(n)
    index, rows = torch.randint(count, (n,), generator=generator).int(), torch.randn(n, width, generator=generator)
    expected = torch.zeros(count, width, dtype=torch.float64).index_add_(0, index, rows.double()).float()
    torch.testing.assert_close(Sorted(index, count)(rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiled")
def test_products_of_any_tokens() -> None:
    """One token without a dimension, tokens that are not contiguous, gradients that are one number for all."""
    tensors, spec = random_layer(LAYERS["two books"], 21, 40)
    found = []
    for own in (True, False):
        linear = CodedLinear(tensors, spec, None)
        linear._compiled = own
        x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (linear(x.T).sum() + linear(x[:, 0]).sum()).backward()
        found.append([x.grad, *(parameter.grad for parameter in linear.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
    half = CodedLinear(tensors, spec, None)(torch.ones(2, 40, dtype=torch.half))
    assert half.dtype == torch.half, "of other types by torch"


@pytest.mark.usefixtures("compiled")
def test_no_weight_is_kept_and_parameters_must_not_change_meanwhile() -> None:
    tensors, spec = random_layer(LAYERS["two books"], 21, 400)
    linear = CodedLinear(tensors, spec, None)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        product = linear(torch.ones(2, 400))
    assert 0 < max(kept) < 21 * 400
    product.sum().backward()
    product = linear(torch.ones(2, 400))
    with torch.no_grad():
        linear.centroids.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_length_that_the_format_does_not_have(library: ctypes.CDLL) -> None:
    none = ctypes.c_void_p(None)
    arguments = [none, none, ctypes.c_int64(1), ctypes.c_int64(1), *[none] * 5, *[ctypes.c_int64(1)] * 3]
    assert library.vptq_decode(ctypes.c_int64(17), *arguments, none, ctypes.c_int64(0), none) == -1
