"""The stationary and the aligned layout without a GPU: their packing, and the kernels in float64 (``kernels64``)."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels64 import Kernels, decoded_by
from tests.packers import OWN_SHARED_BYTES, SLICE_ROWS, Plan, flat
from tests.shards import CPU, drawn_part, fused_layer
from tests.strategies import PUBLIC_FORMATS, few, random_tensors, spec_extras, specs
from vllm_vptq.format import LayerSpec, dequantize, parse_format
from vllm_vptq.layouts import compact, stationary
from vllm_vptq.layouts.flat import alike
from vllm_vptq.layouts.work import ABSENT, Kind, LookupLayout
from vllm_vptq.parameters import ModuleShard, cut_module


def check(
    shards: list[ModuleShard], weight: Tensor, processors: int = 132, dtype: torch.dtype = torch.float16
) -> list[Plan]:
    """Packs a layer, and compares the products with ``weight`` in float64, and the decoded weight with it.

    Returns the plans of the aligned layout, which wide.cuh serves alone, and of the stationary one, where multiply.cu
    has what it can.
    """
    dense = weight.double().numpy()
    x = np.random.default_rng(0).standard_normal((140, dense.shape[1]))
    plans = []
    for layout in (build(shards, processors, dtype, lists=False), build(shards, processors, dtype, most=16)):
        assert layout.books.dtype == dtype and layout.books.numel() % 8 == 0
        kernels = Kernels(layout)
        kernels.plan.check_limits(processors)
        for tokens in (5, 13, 29, 69, 140):  # the last one in two launches
            np.testing.assert_allclose(kernels.linear(x[:tokens]), x[:tokens] @ dense.T, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(kernels.weight(40), dense, rtol=1e-12, atol=1e-12)
        plans.append(kernels.plan)
    by_wide = [[v.max_tokens for v in plan.variants if v.launches[0].wide != ABSENT] for plan in plans]
    assert by_wide == [[8, 16, 32, 64, 128], [32, 64, 128]]
    return plans


def build(
    shards: list[ModuleShard], processors: int = 132, dtype: torch.dtype = torch.float16, most: int | None = None,
    tensor_groups: bool = True, lists: bool = True,
) -> LookupLayout:  # fmt: skip
    """Lays a layer out; ``most``: tokens that multiply.cu serves, if the layout is not to decide."""
    served = stationary.few_tokens if most is None else lambda *_: most
    with mock.patch.object(stationary, "few_tokens", served):
        return stationary.build(shards, dtype, CPU, stationary.Gpu(processors, tensor_groups), 64, lists)


FORMATS = {
    "v8-k65536": dict(vector_len=8, num_centroids=65536),
    "v8-k65536-256": dict(vector_len=8, num_centroids=65536, num_res_centroids=256),
    "v8-k16-16384": dict(vector_len=8, num_centroids=16, num_res_centroids=16384),
    "v8-k65536-512": dict(vector_len=8, num_centroids=65536, num_res_centroids=512),
    "v8-k256-256": dict(vector_len=8, num_centroids=256, num_res_centroids=256),
    "v8-k8192": dict(vector_len=8, num_centroids=8192),
    "v2-k256": dict(vector_len=2, num_centroids=256),
    "v3-k2048": dict(vector_len=3, num_centroids=2048),
    "v5-k256": dict(vector_len=5, num_centroids=256),
    "v6-k4096": dict(vector_len=6, num_centroids=4096),
    "v7-k256-256": dict(vector_len=7, num_centroids=256, num_res_centroids=256),
    "v12-k4096-64": dict(vector_len=12, num_centroids=4096, num_res_centroids=64),
    "v12-k65536": dict(vector_len=12, num_centroids=65536),
    "v16-k16384-32": dict(vector_len=16, num_centroids=16384, num_res_centroids=32),
    "v20-k16384-65536": dict(vector_len=20, num_centroids=16384, num_res_centroids=65536),
    "v20-k512-4": dict(vector_len=20, num_centroids=512, num_res_centroids=4),
}
EXTRAS = spec_extras(num_outlier_centroids=9000)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, extra):
    extras = EXTRAS[extra]
    spec = LayerSpec(300 + extras.get("outlier_size", 0), 61, **FORMATS[name], **extras)
    check(*fused_layer([spec]))


@pytest.mark.parametrize("name", PUBLIC_FORMATS)
def test_public_formats(name):
    check(*fused_layer([LayerSpec(264, 72, *parse_format(name), enable_norm=True)]))


def check_any(spec: LayerSpec, seed: int, processors: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Checks some rows and columns of a module."""
    shard, weight = drawn_part(spec, seed, dtype, data)
    check([shard], weight, processors, dtype)


anything = dict(
    seed=st.integers(0, 99),
    processors=st.sampled_from([1, 2, 7, 132]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    data=st.data(),
)


@few(300)
@given(spec=specs(max_out=60, max_group_size=200), **anything)
def test_any_spec(spec, seed, processors, dtype, data):
    check_any(spec, seed, processors, dtype, data)


@st.composite
def large_specs(draw: st.DrawFn) -> LayerSpec:
    """With books of every way to look them up, vectors of up to three planes, and outputs in several strips."""
    sizes = st.sampled_from([16, 256, 512, 4096, 8192, 16384, 65536])
    main, residual = draw(sizes), draw(st.one_of(st.just(0), sizes))
    length = draw(st.sampled_from([2, 5, 8, 12, 16, 20, 24]))
    fixed = dict(num_centroids=main, num_res_centroids=residual, vector_len=length)
    return draw(specs(max_out=900, max_group_size=700, group_num=draw(st.integers(1, 2)), **fixed))


@few(200)
@given(spec=large_specs(), **anything)
def test_any_large_spec(spec, seed, processors, dtype, data):
    check_any(spec, seed, processors, dtype, data)


@pytest.mark.parametrize("processors", [1, 5, 132])
def test_fused(processors):
    plain = LayerSpec(520, 96, **FORMATS["v8-k65536"])
    normed = LayerSpec(520, 50, **FORMATS["v6-k4096"], **EXTRAS["column norm"])
    rows = LayerSpec(520, 33, **FORMATS["v8-k256-256"], **EXTRAS["row norm"])
    for plan in check(*fused_layer([plain, None, normed, rows, None, plain]), processors):
        assert [m.dense for m in plan.variants[0].modules] == [0, 1, 0, 0, 1, 0]
        assert {v.launches[0].wide for v in plan.variants} <= {ABSENT, Kind.DOT}


@pytest.mark.parametrize("extra", ["plain", "column norm"])
def test_fused_of_three_vector_lengths(extra):
    """q, k and v as `vptq-quantize --bits` writes them: each with the books that suit it."""
    names = {"v3-k128-0": 96, "v4-k512-0": 50, "v8-k512-512": 33}
    specs = [LayerSpec(520, rows, *parse_format(name), **EXTRAS[extra]) for name, rows in names.items()]
    for plan in check(*fused_layer(specs)):
        assert {v.launches[0].wide for v in plan.variants} <= {ABSENT, Kind.DOT}
        assert len(plan.variants[0].modules) == 3


@pytest.mark.parametrize(
    "name", ["v8-k65536-256", "v8-k256-256", "v12-k4096-64", "v6-k4096", "v3-k2048", "v20-k16384-65536"]
)
@pytest.mark.parametrize("extra", ["column norm", "row norm"])
def test_shards_that_skip(name, extra):
    spec = LayerSpec(512, 101, **FORMATS[name], **EXTRAS[extra])
    for rows, columns in [((37, 93), (0, 512)), ((0, 101), (128, 384)), ((100, 101), (5, 512))]:
        for plan in check(*fused_layer([spec], rows=rows, columns=columns)):
            assert [p.skip for p in plan.variants[0].parts][-1] == rows[0] % spec.vector_len


@pytest.mark.parametrize("shape", [(1, 2), (13, 4097), (24, 9000), (3, 4096)], ids=str)
@pytest.mark.parametrize("name", ["v8-k65536-256", "v8-k256-256", "v8-k65536", "v6-k4096", "v12-k65536"])
def test_shapes(name, shape):
    """(out, in): several tiles and spans of columns, tails, and so few rows that columns are cut further."""
    for plan in check(*fused_layer([LayerSpec(shape[1], shape[0], **FORMATS[name])])):
        if shape[1] > 4096:
            for v in plan.variants:
                assert all(part.splits > 1 for part in v.parts)
                assert all(len({job.column_begin for job in flat(launch)}) > 1 for launch in v.launches)


@pytest.mark.parametrize("name", ["v8-k65536-256", "v8-k256-256", "v6-k4096", "v20-k16384-65536"])
def test_outputs_in_more_or_fewer_pieces(name):
    """Thread blocks of wide.cuh end in the middle of some outputs."""
    uneven = set()
    for processors in (1, 4, 5, 7):
        plans = check(*fused_layer([LayerSpec(2900, 500, **FORMATS[name], **EXTRAS["column norm"])]), processors)
        parts = [part for plan in plans for v in plan.variants for part in v.parts]
        if any(part.counts != ABSENT for part in parts):
            uneven.add(processors)
    assert uneven and 1 not in uneven


@pytest.mark.parametrize(
    ("names", "wide", "most", "beside"),
    [
        ("v8-k65536", Kind.FAR, 16, None),
        ("v8-k65536 v8-k256-256", Kind.DOT, 16, Kind.BYTE_PAIRS),
        ("v8-k65536-512", Kind.DOT, 16, Kind.SHORTS),
        ("v8-k65536 v8-k16-16384", Kind.DOT, 16, Kind.BYTES),
        ("v8-k65536-256", Kind.FAR_BYTES, 16, Kind.BYTES),
        ("v8-k65536-256 v8-k65536-512", Kind.DOT, 16, Kind.DOT),
        ("v12-k65536", Kind.FAR, 8, None),
        ("v8-k65536 v12-k65536", Kind.FAR, 8, None),
        ("v8-k256-256", Kind.BYTE_PAIRS, 0, None),
        ("v8-k256-256 v7-k256-256", Kind.BYTE_PAIRS, 0, None),  # as --books bytes writes them
        ("v8-k8192 v6-k4096", Kind.SHORTS, 0, None),
        ("v2-k256 v5-k256", Kind.BYTES, 0, None),
        ("v2-k256 v3-k2048", Kind.DOT, 0, None),
        ("v20-k512-4", Kind.DOT, 0, None),
    ],
)
def test_which_kernel_serves(names, wide, most, beside):
    """``beside``: by a launch of its own, after that of the lists."""
    shards, weight = fused_layer([LayerSpec(320, 61, **FORMATS[name]) for name in names.split()])
    x = np.random.default_rng(1).standard_normal((69, 320))
    for tensor_groups in (True, False):
        layout = build(shards, tensor_groups=tensor_groups)
        kernels = Kernels(layout)
        kernels.plan.check_limits(132)
        few = [ABSENT] if beside is None else [ABSENT, beside]
        expected = [(tokens, few if tokens <= most else [wide]) for tokens in (8, 16, 32, 64, 128)]
        if not tensor_groups:
            expected = [(8, [ABSENT]), (16, [ABSENT])]
        assert [(v.max_tokens, [launch.wide for launch in v.launches]) for v in kernels.plan.variants] == expected
        assert kernels.plan.direct_tokens == 64
        for tokens in (3, 13, 69):
            expected_y = x[:tokens] @ weight.double().numpy().T
            np.testing.assert_allclose(kernels.linear(x[:tokens]), expected_y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kib", [99, 163])
@pytest.mark.parametrize("extra", ["column norm", "groups"])
@pytest.mark.parametrize("name", ["v8-k256-256", "v6-k4096", "v3-k2048", "v12-k4096-64", "v20-k512-4"])
def test_less_shared_memory(name, extra, kib):
    """Of cards before Hopper: books are in fewer images there."""
    shards, weight = fused_layer([LayerSpec(480, 61, **FORMATS[name], **EXTRAS[extra])])
    layout = stationary.build(shards, torch.float16, CPU, stationary.Gpu(108, False, kib << 10), 64)
    kernels = Kernels(layout)
    assert kernels.plan.shared_bytes + OWN_SHARED_BYTES <= kib << 10
    x = np.random.default_rng(2).standard_normal((21, 480))
    for tokens in (3, 13, 21):
        expected = x[:tokens] @ weight.double().numpy().T
        np.testing.assert_allclose(kernels.linear(x[:tokens]), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(kernels.weight(40), weight.double().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "columns", "extra", "prepared"),
    [
        ("v8-k65536", 320, "plain", []),
        ("v8-k65536", 320, "row norm", [16, 32, 64, 128]),
        ("v8-k65536", 320, "column norm", [16, 32, 64, 128]),
        ("v8-k65536-256", 320, "column norm", [8, 16, 32, 64, 128]),
        ("v8-k256-256", 320, "column norm", [8, 16, 32, 64, 128]),
        ("v8-k256-256", 320, "plain", []),
        ("v8-k65536", 324, "plain", [8, 16, 32, 64, 128]),
        ("v8-k65536", 480, "groups", [8, 16, 32, 64, 128]),
    ],
)
def test_what_is_prepared(name, columns, extra, prepared):
    """Lists of up to 8 tokens do without, unless columns are scattered or cannot be loaded 16 bytes at a time."""
    shards, _ = fused_layer([LayerSpec(columns, 61, **FORMATS[name], **EXTRAS[extra])])
    plan = Kernels(build(shards)).plan
    plan.check_limits(132)
    assert [v.max_tokens for v in plan.variants if v.preparations] == prepared
    for v in plan.variants:
        assert all(m.dots == (extra.endswith("norm")) for m in v.modules)


@pytest.mark.parametrize("entries", [256, 257, 4096, 4097, 4260, 6144, 6200, 8192, 8193])
def test_images_fill_shared_memory(entries):
    """Only books of outliers may have any size."""
    extras = dict(outlier_size=20, outlier_vector_len=8, num_outlier_centroids=entries)
    check(*fused_layer([LayerSpec(320, 100, **FORMATS["v8-k256-256"], **extras)]), processors=3)


@pytest.mark.parametrize("spans", [1, 2, 8, 28, 56])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 256])
def test_thread_blocks_decode_every_row_once(spans, rows):
    for blocks in (1, 2, 7, 44, 132, 176, 264):
        if blocks > spans * rows:
            continue
        times, most = np.zeros((spans, rows), int), 0
        for block in range(blocks):
            pieces = list(decoded_by(block, blocks, spans, rows))
            most = max(most, sum(len(own) for _, own in pieces))
            for span, own in pieces:
                times[span, own] += 1
        assert (times == 1).all()
        assert most <= 1.02 * spans * rows / blocks + 5


def test_neighbours_share_a_slice():
    """One thread block does everything, slice by slice: 3 ranges of columns and 8 slices, each filled once."""
    shards, weight = fused_layer([LayerSpec(9000, 24, **FORMATS["v8-k65536"])])
    _, plan = check(shards, weight, processors=1)
    for v, ranges in zip(plan.variants[:2], (3, 5), strict=True):
        (jobs,) = v.launches[0].jobs
        assert [job.book for job in jobs] == [SLICE_ROWS * s for s in range(8) for _ in range(ranges)]


@pytest.mark.parametrize("name", ["v8-k65536", "v8-k65536-256", "v12-k65536", "v20-k16384-65536", "v8-k256-256"])
def test_layers_that_are_alike_have_one_plan(name):
    """It and sizes are constants of the compiled graph, and equal layers are to be compiled once, whatever their
    indices; or twice, where sizes lie about a step of those allowed."""
    specs = [LayerSpec(320, rows, **FORMATS[name], **EXTRAS["column norm"]) for rows in (96, 48, 48)]
    made = []
    for seed in (0, 7, 14, 21):
        tensors = [random_tensors(spec, seed + i) for i, spec in enumerate(specs)]
        whole = [cut_module(own, spec, (0, spec.shape[0]), (0, 320)) for own, spec in zip(tensors, specs, strict=True)]
        made.append(build(whole))
    assert all(one.plan == made[0].plan for one in made)
    shapes = [[None if t is None else t.shape for t in one.tensors().values()] for one in made]
    assert sum(one != other for i, one in enumerate(shapes) for other in shapes[:i]) in (0, 3, 4)  # two kinds at most
    assert not torch.equal(made[0].codes[:1000], made[1].codes[:1000])


def test_pieces_of_a_module_share_its_book():
    tensors = random_tensors(spec := LayerSpec(64, 96, **FORMATS["v8-k65536"]), 0)
    shards = [cut_module(tensors, spec, rows, (0, 64)) for rows in ((0, 32), (32, 64), (64, 96))]
    shards = [replace(s, segments=(replace(s.segments[0], book=shards[0].segments[0].book),)) for s in shards]
    assert build(shards).books.numel() == 65536 * 8
    check(shards, dequantize(tensors, spec, torch.float64))


@pytest.mark.parametrize("extra", EXTRAS)
def test_norm_columns_and_dense_weights_lie_as_in_the_compact_layout(extra):
    spec = LayerSpec(300 + EXTRAS[extra].get("outlier_size", 0), 50, **FORMATS["v12-k4096-64"], **EXTRAS[extra])
    shards, _ = fused_layer([spec, None, spec])
    made, small = build(shards), compact.build(shards, torch.float16, CPU)
    for name in ("norm", "columns", "dense"):
        mine, theirs = getattr(made, name), getattr(small, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 1000, 12345, (1 << 24) + 1])
def test_sizes_of_lists_are_alike(size):
    near = alike(size)
    assert size <= near <= size * 65 / 64 and alike(near) == near
    if size > 1000:
        assert alike(near - size // 200) == near
