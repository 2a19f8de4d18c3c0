"""The stationary layout without a GPU: its packing, and kernels that do in float64 what csrc/cuda does in fragments.

``Kernels`` gets what the CUDA kernels get, the tensors of a layout and the plan, and works off every thread block's
jobs one after another. Memory that nobody has written is NaN; an address outside of a tensor or of shared memory, and
a second write to a place of the workspace or of the weight, fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.packers import (
    LANE_OF_ROW,
    LANES,
    SLICE_ROWS,
    SPAN_TILES,
    STEPS,
    TILE_COLUMNS,
    TILE_ROWS,
    WARPS,
    Plan,
    Shared,
    image_row,
    resident_place,
    round8,
)
from tests.shards import CPU
from tests.strategies import few, random_tensors, specs
from vllm_vptq.format import LayerSpec, dequantize
from vllm_vptq.layouts import compact, stationary
from vllm_vptq.layouts.work import ABSENT, Job, Kind, LookupLayout, Module
from vllm_vptq.parameters import ModuleShard, Range, cut_module

Vectors = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


class Kernels:
    """A layer as the GPU sees it."""

    def __init__(self, layout: LookupLayout) -> None:
        self.tensors = {n: t.numpy() for n, t in layout.tensors().items() if t is not None and n != "books"}
        assert layout.codes.dtype == layout.work.dtype == torch.int32 and layout.books.dtype.itemsize == 2
        self.tensors["codes"] = self.tensors["codes"].view(np.uint32).astype(np.int64)
        self.books = layout.books.double().numpy().reshape(-1, 8)
        self.plan = Plan(layout.work.tolist(), layout.plan)

    def linear(self, x: np.ndarray) -> np.ndarray:
        """``lookup_linear`` of few tokens."""
        y = np.full((len(x), self.plan.out_features), np.nan)
        step = self.plan.variants[-1].max_tokens
        for first in range(0, len(x), step):
            some = x[first : first + step]
            v = next(v for v in self.plan.variants if len(some) <= v.max_tokens)
            y[first : first + step] = self._finish(v, self._multiply(v, some))
        for d in self.plan.dense:
            y[:, d.out_begin : d.out_begin + d.rows] = x @ self._dense(d).T
        return y

    def weight(self) -> np.ndarray:
        """``lookup_weight``."""
        weight = np.full((self.plan.out_features, self.plan.in_features), np.nan)
        for m in self.plan.variants[0].modules:
            if not m.dense:
                weight[m.out_begin : m.out_end] = self._decode(m)
        for d in self.plan.dense:
            weight[d.out_begin : d.out_begin + d.rows] = self._dense(d)
        return weight

    def _take(self, name: str, at: int, size: int) -> np.ndarray:
        tensor = self.tensors[name]
        assert at >= 0 and at + size <= len(tensor)
        return tensor[at : at + size]

    def _norm(self, at: int, size: int, absent: float) -> np.ndarray:
        return np.full(size, absent) if at == ABSENT else self._take("norm", at, size).astype(np.float64)

    def _dense(self, d: SimpleNamespace) -> np.ndarray:
        return self._take("dense", d.offset, d.rows * self.plan.in_features).reshape(d.rows, -1).astype(np.float64)

    def _book(self, at: int, rows: int) -> np.ndarray:
        assert at >= 0 and rows > 0 and at + rows <= len(self.books)
        return self.books[at : at + rows]

    def _sources(self, job: Job) -> np.ndarray:
        """Columns of the input by columns of the segment, up to the end of the job."""
        if job.column_list == ABSENT:
            return np.arange(job.column_end)
        return self._take("columns", job.column_list, job.column_end)

    # multiply.cu

    def _multiply(self, v: SimpleNamespace, x: np.ndarray) -> np.ndarray:
        workspace, written = np.full((len(x), v.stride), np.nan), np.zeros(v.stride, bool)
        assert v.stride % 2 == 0

        def store(at: int, sums: np.ndarray) -> None:
            where = slice(at, at + sums.shape[1])
            assert at >= 0 and where.stop <= v.stride and not written[where].any()
            written[where], workspace[:, where] = True, sums

        for jobs in v.jobs:
            shared = Shared(self.plan.shared_bytes)
            for job in jobs:
                if job.kind != Kind.SLICED:
                    shared.held = ABSENT
                if job.kind == Kind.DOT:
                    part = x[:, job.column_begin : job.column_end]
                    shift = self._norm(job.shift, job.column_end, 1)[job.column_begin :]
                    store(job.out, (part * shift).sum(1, keepdims=True))
                    continue
                assert job.out % 2 == 0  # sums are stored in pairs
                scaled = x * self._norm(job.scale, x.shape[1], 1)
                acts = scaled[:, self._sources(job)[job.column_begin :]].T
                do = self._sliced if job.kind == Kind.SLICED else self._resident
                for row, sums in do(job, acts, 1 if len(x) <= 8 else 2, shared):
                    store(job.out + row * 8, sums)
        return workspace

    def _sliced(self, job: Job, acts: np.ndarray, octets: int, shared: Shared) -> Iterator[tuple[int, np.ndarray]]:
        if shared.held != job.book:  # else left by the job before
            shared.put(np.arange(job.book_rows), self._book(job.book, job.book_rows))
            shared.held = job.book
        tiles = SPAN_TILES // octets
        assert SLICE_ROWS + octets * tiles * TILE_ROWS <= len(shared.rows)
        first_tile, last_tile = job.column_begin // TILE_COLUMNS, -(-job.column_end // TILE_COLUMNS)
        tile, column = np.full((tiles * TILE_ROWS, acts.shape[1]), np.nan), np.arange(len(acts))
        tile[column + column // TILE_COLUMNS * 8] = acts
        tile[np.arange(tiles) * TILE_ROWS + TILE_COLUMNS] = 0
        for row in range(job.row_begin, job.row_end):
            at, slice_row = self._entries(job, row, first_tile, last_tile)
            at = at - first_tile % SPAN_TILES * TILE_ROWS
            assert (at >= 0).all()
            yield row, tile[at].T @ shared.rows[slice_row]

    def _entries(self, job: Job, row: int, first_tile: int, last_tile: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the entries of lists, padding included: the column as a row of shared memory, and the row of the slice."""
        assert 0 <= first_tile <= last_tile <= job.list_tiles
        begin, *_, end = self._take("codes", job.lists + row * job.list_tiles + first_tile, last_tile - first_tile + 1)
        words = self._take("codes", job.codes + begin * 32, (end - begin) * 32).reshape(-1, 32)
        return (words >> 19).reshape(-1), (words[:, LANE_OF_ROW] >> 2 & (SLICE_ROWS - 1)).reshape(-1)

    def _resident(self, job: Job, acts: np.ndarray, octets: int, shared: Shared) -> Iterator[tuple[int, np.ndarray]]:
        steps, base = STEPS[Kind(job.kind)], 2 * WARPS * 128 * 4 * octets // 16
        self._fill_images(job, shared, base)
        loads, first_load = -(-len(acts) // (steps * 16)), job.column_begin // (steps * 16)
        acts = np.concatenate([acts, np.zeros((loads * steps * 16 - len(acts), acts.shape[1]))])
        acts = acts[resident_place(np.zeros(1, int), loads, steps)[1][0]]
        for pair in range(job.row_begin, job.row_end):
            values = self._look_up(job, pair, first_load, loads, shared, base)
            for odd in range(2):
                lanes = np.arange(32) // 8 % 2 == odd
                mine, theirs = values[:, lanes].reshape(-1, 8), acts[:, lanes].reshape(-1, acts.shape[-1])
                yield 2 * pair + odd, theirs.T @ mine

    def _fill_images(self, job: Job, shared: Shared, base: int) -> None:
        books = [(job.book, job.book_rows), (job.res_book, job.res_rows)]
        for at, rows in books if job.kind == Kind.BYTE_PAIRS else books[:1]:
            book, row = self._book(at, rows), np.arange(rows)
            for i in range(job.copies):
                place = image_row(row, i, rows) if job.kind == Kind.SHORTS else row * 8 + (i + row) % 8
                shared.put(base + place, book)
            base += round8(rows) * job.copies

    def _look_up(self, job: Job, pair: int, first_load: int, loads: int, shared: Shared, base: int) -> np.ndarray:
        """Vectors ``[loads, 32, steps, 8]`` of a pair of vector rows."""
        assert job.codes % 4 == job.row_words % 4 == 0  # words are loaded by four
        assert (first_load + loads) * 128 <= job.row_words
        words = self._take("codes", job.codes + pair * job.row_words + first_load * 128, loads * 128)
        per_word = STEPS[Kind(job.kind)] // 4
        bits = 32 // per_word
        code = words.reshape(loads, 32, 4, 1) >> bits * np.arange(per_word) & ((1 << bits) - 1)
        code, lane = code.reshape(loads, 32, -1), LANES[:, None] % 8
        if job.kind == Kind.SHORTS:
            return shared.rows[base + code]
        values = shared.rows[base + (code & 0xFF) * 8 + lane]
        if job.kind == Kind.BYTE_PAIRS:
            values = values + shared.rows[base + round8(job.book_rows) * job.copies + (code >> 8) * 8 + lane]
        return values

    # finish.cu

    def _finish(self, v: SimpleNamespace, workspace: np.ndarray) -> np.ndarray:
        y = np.full((len(workspace), self.plan.out_features), np.nan)
        for m in v.modules:
            if m.dense:
                continue
            n, product = np.arange(m.out_end - m.out_begin), 0
            for part in v.parts[m.part_begin : m.part_end]:
                vector_row, element = np.divmod(n + part.skip, part.vector_len)
                mine = element // 8 == part.plane
                at = (part.out + vector_row * 8 + element % 8)[:, None] + np.arange(part.splits) * part.stride
                product = product + np.where(mine, workspace[:, np.where(mine[:, None], at, 0)].sum(2), 0)
            dot = 0 if m.dot == ABSENT else workspace[:, [m.dot]]
            shift = self._norm(ABSENT if m.scale == ABSENT else m.shift, len(n), 1)
            y[:, m.out_begin : m.out_end] = product * self._norm(m.scale, len(n), 1) + dot * shift
        return y

    # decode.cu

    def _decode(self, m: Module) -> np.ndarray:
        weight = np.full((m.out_end - m.out_begin, self.plan.in_features), np.nan)
        for p in range(m.part_begin, m.part_end):
            part, seen = self.plan.variants[0].parts[p], np.zeros(weight.shape, bool)
            for job in self.plan.sources[p]:
                element = np.arange(min(8, part.vector_len - part.plane * 8))
                for row, column, vectors in self._vectors(job):
                    output = (row * part.vector_len + part.plane * 8 - part.skip)[:, None] + element
                    source = np.broadcast_to(self._sources(job)[column][:, None], output.shape)
                    inside = (output >= 0) & (output < len(weight))
                    to, value = (output[inside], source[inside]), vectors[:, : len(element)][inside]
                    assert not seen[to].any() and (np.isnan(weight[to]) != bool(part.adds)).all()
                    seen[to] = True
                    if part.adds:
                        value = value + weight[to]
                    if not part.added_to:
                        for scale, shift, axis in ((job.scale, job.shift, 1), (m.scale, m.shift, 0)):
                            size = weight.shape[axis]
                            value = value * self._norm(scale, size, 1)[to[axis]]
                            value += self._norm(shift if scale != ABSENT else ABSENT, size, 0)[to[axis]]
                    weight[to] = value
        return weight

    def _vectors(self, job: Job) -> Vectors:
        """Vector rows, columns of the segment, and the vectors there."""
        shared = Shared(self.plan.shared_bytes)
        if job.kind == Kind.SLICED:
            shared.put(np.arange(job.book_rows), self._book(job.book, job.book_rows))
            for row in range(job.row_begin, job.row_end):
                for tile in range(0, job.list_tiles, SPAN_TILES):
                    at, slice_row = self._entries(job, row, tile, min(tile + SPAN_TILES, job.list_tiles))
                    kept = at % TILE_ROWS != TILE_COLUMNS
                    column = (tile * TILE_COLUMNS + at - at // TILE_ROWS * 8)[kept]
                    yield np.full(len(column), row), column, shared.rows[slice_row[kept]]
            return
        self._fill_images(job, shared, 0)
        steps = STEPS[Kind(job.kind)]
        loads = -(-job.column_end // (steps * 16))
        for pair in range(job.row_begin, job.row_end):
            row, column = (a.reshape(-1) for a in np.broadcast_arrays(*resident_place(np.array([pair]), loads, steps)))
            inside = column < job.column_end
            values = self._look_up(job, pair, 0, loads, shared, 0).reshape(-1, 8)
            yield row[inside], column[inside], values[inside]


def check(shards: list[ModuleShard], weight: Tensor, processors: int = 132, dtype: torch.dtype = torch.float16) -> Plan:
    """Packs a layer, and compares the products with ``weight`` in float64, and the decoded weight with it."""
    layout = stationary.build(shards, dtype, CPU, processors, 32)
    assert layout.books.dtype == dtype and layout.books.numel() % 8 == 0
    kernels, dense = Kernels(layout), weight.double().numpy()
    kernels.plan.check_limits(processors)
    x = np.random.default_rng(0).standard_normal((29, dense.shape[1]))
    for tokens in (3, 29):  # one call of the first variant, two of the second
        np.testing.assert_allclose(kernels.linear(x[:tokens]), x[:tokens] @ dense.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(kernels.weight(), dense, rtol=1e-12, atol=1e-12)
    return kernels.plan


def layer(
    layer_specs: list[LayerSpec | None],
    rows: Range | None = None,
    columns: Range | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[list[ModuleShard], Tensor]:
    """Shards of a fused layer (None: a dense module) and its weight."""
    shards, weights = [], []
    for seed, spec in enumerate(layer_specs):
        if spec is None:
            dense = torch.randn(24, shards[0].in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
            shards.append(ModuleShard(*dense.shape, dense=dense))
            weights.append(dense.double())
            continue
        tensors = random_tensors(spec, seed, dtype)
        span = rows or (0, spec.shape[0]), columns or (0, spec.shape[1])
        shards.append(cut_module(tensors, spec, *span))
        weights.append(dequantize(tensors, spec, torch.float64)[slice(*span[0]), slice(*span[1])])
    return shards, torch.cat(weights)


FORMATS = {
    "v8-k65536": dict(vector_len=8, num_centroids=65536),
    "v8-k65536-256": dict(vector_len=8, num_centroids=65536, num_res_centroids=256),
    "v8-k16-16384": dict(vector_len=8, num_centroids=16, num_res_centroids=16384),
    "v8-k256-256": dict(vector_len=8, num_centroids=256, num_res_centroids=256),
    "v8-k8192": dict(vector_len=8, num_centroids=8192),
    "v6-k4096": dict(vector_len=6, num_centroids=4096),
    "v12-k4096-64": dict(vector_len=12, num_centroids=4096, num_res_centroids=64),
    "v16-k16384-32": dict(vector_len=16, num_centroids=16384, num_res_centroids=32),
    "v20-k512-4": dict(vector_len=20, num_centroids=512, num_res_centroids=4),
}
EXTRAS = {
    "plain": {},
    "column norm": dict(enable_norm=True, enable_perm=True),
    "row norm": dict(enable_norm=True, norm_dim=1),
    "groups": dict(group_num=3, enable_perm=True),
    "outliers": dict(outlier_size=12, outlier_vector_len=4, num_outlier_centroids=9000, enable_norm=True),
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, extra):
    extras = EXTRAS[extra]
    spec = LayerSpec(300 + extras.get("outlier_size", 0), 61, **FORMATS[name], **extras)
    check(*layer([spec]))


@few(150)
@given(
    spec=specs(max_out=60, max_group_size=200),
    seed=st.integers(0, 99),
    processors=st.sampled_from([1, 2, 7, 132]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_any_spec(spec, seed, processors, dtype, data):
    tensors = random_tensors(spec, seed, dtype)
    rows, columns = (
        tuple(sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))))
        for size in spec.shape
    )
    weight = dequantize(tensors, spec, torch.float64)[slice(*rows), slice(*columns)]
    check([cut_module(tensors, spec, rows, columns)], weight, processors, dtype)


@pytest.mark.parametrize("processors", [1, 5, 132])
def test_fused(processors):
    plain = LayerSpec(520, 96, **FORMATS["v8-k65536"])
    normed = LayerSpec(520, 50, **FORMATS["v6-k4096"], **EXTRAS["column norm"])
    rows = LayerSpec(520, 33, **FORMATS["v8-k256-256"], **EXTRAS["row norm"])
    plan = check(*layer([plain, None, normed, rows, None, plain]), processors)
    assert [m.dense for m in plan.variants[0].modules] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("name", ["v8-k65536-256", "v8-k256-256", "v12-k4096-64", "v6-k4096"])
@pytest.mark.parametrize("extra", ["column norm", "row norm"])
def test_shards_that_skip(name, extra):
    spec = LayerSpec(512, 101, **FORMATS[name], **EXTRAS[extra])
    for rows, columns in [((37, 93), (0, 512)), ((0, 101), (128, 384)), ((100, 101), (5, 512))]:
        plan = check(*layer([spec], rows, columns))
        assert [p.skip for p in plan.variants[0].parts][-1] == rows[0] % spec.vector_len


@pytest.mark.parametrize("shape", [(1, 2), (13, 4097), (24, 9000), (3, 4096)], ids=str)
@pytest.mark.parametrize("name", ["v8-k65536-256", "v8-k256-256", "v8-k65536", "v6-k4096"])
def test_wide(name, shape):
    """(out, in): several tiles and spans of columns, tails, and so few rows that columns are cut further."""
    plan = check(*layer([LayerSpec(shape[1], shape[0], **FORMATS[name])]))
    if shape[1] > 4096:
        for v in plan.variants:
            assert all(part.splits > 1 for part in v.parts)
            assert len({job.column_begin for jobs in v.jobs for job in jobs}) > 1


def test_neighbours_share_a_slice():
    """One thread block does everything, slice by slice: 3 ranges of columns and 8 slices, each filled once."""
    shards, weight = layer([LayerSpec(9000, 24, **FORMATS["v8-k65536"])])
    plan = check(shards, weight, processors=1)
    for v, ranges in zip(plan.variants, (3, 5), strict=True):
        (jobs,) = v.jobs
        assert [job.book for job in jobs] == [SLICE_ROWS * s for s in range(8) for _ in range(ranges)]


def test_pieces_of_a_module_share_its_book():
    tensors = random_tensors(spec := LayerSpec(64, 96, **FORMATS["v8-k65536"]), 0)
    shards = [cut_module(tensors, spec, rows, (0, 64)) for rows in ((0, 32), (32, 64), (64, 96))]
    shards = [replace(s, segments=(replace(s.segments[0], book=shards[0].segments[0].book),)) for s in shards]
    assert stationary.build(shards, torch.float16, CPU, 132, 32).books.numel() == 65536 * 8
    check(shards, dequantize(tensors, spec, torch.float64))


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_pair_of_layouts_reads_the_same_norm_columns_and_dense_weights(extra):
    spec = LayerSpec(300 + EXTRAS[extra].get("outlier_size", 0), 50, **FORMATS["v12-k4096-64"], **EXTRAS[extra])
    shards, _ = layer([spec, None, spec])
    pair, small = paired.build(shards, torch.float16, CPU, 132, 32), compact.build(shards, torch.float16, CPU)
    for name in ("norm", "columns", "dense"):
        mine, theirs = getattr(pair, name), getattr(small, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
