"""Books and norms made fit for 16 bits: the same weights, and errors near those of the dense product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.shards import CPU, fused_layer, slow_dense
from tests.strategies import random_tensors, spec_extras
from vllm_vptq.format import LayerSpec, dequantize
from vllm_vptq.layouts import choice
from vllm_vptq.layouts.conditioned import condition
from vllm_vptq.parameters import ModuleShard, cut_module

EXTRAS = spec_extras(num_outlier_centroids=70)
NORMS = ["column norm", "row norm", "outliers"]


def between_0_and_1(spec: LayerSpec, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module as the reference makes it: entries between 0 and 1, most of them near the middle."""
    tensors = random_tensors(spec, seed, dtype)
    for name, tensor in tensors.items():
        if name in ("centroids.weight", "outlier_centroids.weight"):
            tensors[name] = (0.5 + 0.12 * tensor.double()).clamp(0, 1).to(dtype)
        if name == "res_centroids.weight":
            tensors[name] = (0.03 * tensor.double()).to(dtype)
    scale = 0.13 * tensors["weight_scale"].double()
    tensors["weight_scale"] = scale.to(dtype)
    tensors["weight_bias"] = (-0.5 * scale * (1 + 0.05 * tensors["weight_bias"].double())).to(dtype)
    return tensors


def shard_of(tensors: dict[str, Tensor], spec: LayerSpec) -> ModuleShard:
    out, columns = spec.shape
    return cut_module(tensors, spec, (0, out), (0, columns))


@pytest.mark.parametrize("residuals", [0, 16])
@pytest.mark.parametrize("extra", NORMS)
def test_the_weight_stays_what_it_is(extra, residuals):
    extras = EXTRAS[extra]
    spec = LayerSpec(60 + extras.get("outlier_size", 0), 29, 6, 64, residuals, **extras)
    tensors = between_0_and_1(spec, 0, torch.float16)
    shard = shard_of(tensors, spec)
    (made,) = condition([shard], torch.float32)
    for before, after in zip(shard.segments, made.segments, strict=True):
        assert 0.4 < before.book.float().mean() < 0.6 and abs(after.book.mean()) < 0.1
        assert after.book.dtype == torch.float32
    torch.testing.assert_close(slow_dense(made), slow_dense(shard), rtol=1e-6, atol=1e-7)
    layout, laid_out = choice.build("layer", [shard], torch.float32, CPU, lambda: pytest.fail("one layout"))
    torch.testing.assert_close(layout.weight(**laid_out), dequantize(tensors, spec).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", ["plain", "column norm", "row norm", "groups"])
def test_books_that_lie_around_zero_stay(extra):
    shards, _ = fused_layer([LayerSpec(300, 40, 8, 256, 16, **EXTRAS[extra]), None])
    made = condition(shards, torch.float16)
    assert all(one is two for one, two in zip(made, shards, strict=True))
    equal = [replace(s, book=torch.ones_like(s.book), res_book=None) for s in shards[0].segments]
    (made,) = condition([replace(shards[0], segments=tuple(equal))], torch.float16)
    assert all(torch.equal(s.book, torch.ones_like(s.book)) for s in made.segments)


def test_pieces_of_a_module_still_share_its_book():
    spec = LayerSpec(64, 96, 8, 256, 16, **EXTRAS["column norm"])
    tensors = between_0_and_1(spec, 0, torch.float16)
    pieces = [cut_module(tensors, spec, rows, (0, 64)) for rows in ((0, 32), (32, 96))]
    assert pieces[0].segments[0].book.data_ptr() == pieces[1].segments[0].book.data_ptr()
    made = condition(pieces, torch.float16)
    assert made[0].segments[0].book is made[1].segments[0].book
    assert made[0].segments[0].book is not pieces[0].segments[0].book


def product(shard: ModuleShard, x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the GPU's kernels round: books, scaled activations, sums of two entries, outputs."""
    books = [
        replace(s, book=rounded(s.book, dtype), res_book=None if s.res_book is None else rounded(s.res_book, dtype))
        for s in shard.segments
    ]
    weight = rounded(slow_dense(replace(shard, segments=tuple(books), scale=None, shift=None)), dtype)
    acts = rounded((x * shard.scale.double()).float(), dtype)
    return rounded((acts @ weight.T + (x @ shard.shift.double())[:, None]).float(), dtype)


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).double()


def errors(shard: ModuleShard, x: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Of products with a shard as it is and conditioned, times that of the dense product."""
    weight = slow_dense(shard)
    exact = x @ weight.T
    dense = (rounded((x @ rounded(weight, dtype).T).float(), dtype) - exact).norm()
    before, after = ((product(s, x, dtype) - exact).norm() / dense for s in (shard, *condition([shard], dtype)))
    return before.item(), after.item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("residuals", "before", "after"), [(0, 1.35, 1.2), (256, 2.5, 1.5)])
def test_errors_of_16_bits(residuals, before, after, dtype):
    spec = LayerSpec(512, 64, 8, 256, residuals, **EXTRAS["column norm"])
    shard = shard_of(between_0_and_1(spec, 0, dtype), spec)
    x = rounded(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), dtype)
    found = errors(shard, x, dtype)
    assert found[0] > before and found[1] < after


SMALL = [(0.02, 0.001, 2.5), (0.005, 0.003, 3), (1e-4, 0.1, 4), (0.02, 1, 0)]
"""Scale, size of activations, and the error before, times the dense product's."""


@pytest.mark.parametrize(("scale", "size", "before"), SMALL)
def test_activations_do_not_vanish(scale, size, before):
    """Entries around 1, as our quantizer makes them: the norm's scale is that of the weights."""
    spec = LayerSpec(512, 64, 8, 256, **EXTRAS["column norm"])
    tensors = random_tensors(spec, 0, torch.float32)
    tensors["weight_scale"] *= scale
    tensors["weight_scale"][3] = 1  # of a column that is always zero
    tensors["weight_bias"] *= scale / 10
    shard = shard_of(tensors, spec)
    shard = replace(shard, segments=tuple(replace(s, book=s.book.half()) for s in shard.segments))
    x = rounded(size * torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), torch.float16)
    x[:, 3] = 0
    found = errors(shard, x, torch.float16)
    assert found[0] > before and found[1] < 1.5
    (made,) = condition([shard], torch.float16)
    weight = slow_dense(shard)
    assert (slow_dense(made) - weight).norm() < 1e-5 * weight.norm()
    assert made.scale is not None and made.scale.abs().median() <= 1 / 8
    for same in (condition([shard], torch.bfloat16), condition([replace(shard, norm_dim=1)], torch.float16)):
        assert torch.equal(same[0].segments[0].book, shard.segments[0].book)
