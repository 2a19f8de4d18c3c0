"""The stationary and the aligned layout without a GPU: their packing, and csrc/cuda's kernels done in float64.

``Kernels`` gets what the CUDA kernels get, the tensors of a layout and the plan, and works off every thread block's
jobs one after another. Memory that nobody has written is NaN; an address outside of a tensor or of shared memory, and
a second write to a place of the workspace or of the weight, fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.packers import (
    COUNTED_SUMS,
    GATHERED_BYTES,
    GRANULE,
    LANE_OF_ROW,
    LANES,
    LARGE_RING_BYTES,
    OWN_SHARED_BYTES,
    RING_BYTES,
    SLICE_ROWS,
    SPAN_TILES,
    STEPS,
    TILE_COLUMNS,
    TILE_OUTPUTS,
    TILE_ROWS,
    WARPS,
    Plan,
    Shared,
    entry_of_image_row,
    flat,
    image_row,
    round8,
)
from tests.shards import CPU, drawn_part, fused_layer
from tests.strategies import few, random_tensors, spec_extras, specs
from vllm_vptq.format import LayerSpec, dequantize
from vllm_vptq.layouts import compact, stationary
from vllm_vptq.layouts.flat import alike
from vllm_vptq.layouts.work import ABSENT, PREPARE_COLUMNS, Job, Kind, LookupLayout, Module
from vllm_vptq.parameters import ModuleShard, cut_module

STRIP_COLUMNS = 32
"""Of a warp of decode.cu."""


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

    def weight(self, step: int) -> np.ndarray:
        """``lookup_weight``, ``step`` outputs at a time, as for many tokens."""
        weight = np.full((self.plan.out_features, self.plan.in_features), np.nan)
        for begin in range(0, len(weight), step):
            for i, m in enumerate(self.plan.variants[0].modules):
                lo, hi = max(begin, m.out_begin), min(begin + step, m.out_end)
                if lo < hi and not m.dense:
                    weight[lo:hi] = self._decode(i, m, lo - m.out_begin, hi - m.out_begin)
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

    def _multiply(self, v: SimpleNamespace, x: np.ndarray) -> np.ndarray:
        workspace = Workspace(len(x), v.stride)
        prepared = self._prepare(v, x, workspace)
        for wide, jobs in ((launch.wide, jobs) for launch in v.launches for jobs in launch.jobs):
            shared = Shared(self.plan.shared_bytes)
            for job in jobs:
                end = -(-job.column_end // GRANULE) * GRANULE
                if job.source != ABSENT:
                    assert wide == ABSENT or (prepared[:, job.source + job.column_end : job.source + end] == 0).all()
                    acts = prepared[:, job.source + job.column_begin : job.source + job.column_end].T
                else:
                    assert job.column_list == ABSENT and x.shape[1] % 8 == 0
                    assert job.scale == ABSENT or (v.max_tokens == 8 and job.kind == Kind.SLICED)
                    assert wide == ABSENT or job.column_end in (end, x.shape[1])
                    scaled = x * self._norm(job.scale, x.shape[1], 1)
                    acts = scaled[:, job.column_begin : job.column_end].T
                if wide != ABSENT:
                    assert job.kind == wide or wide == Kind.DOT
                    self._wide(job, acts, _ring_rows(v.max_tokens, wide), shared, workspace)
                elif job.kind == Kind.SLICED:
                    if job.dot != ABSENT and job.row_begin == 0:
                        assert job.source == ABSENT
                        products = x * self._norm(job.shift, x.shape[1], 1)
                        dot = products[:, job.column_begin : job.column_end].sum(1, keepdims=True)
                        workspace.store(job.dot, dot)
                    self._sliced(job, acts, 1 if len(x) <= 8 else 2, shared, workspace)
                else:
                    self._resident(job, acts, 1 if len(x) <= 8 else 2, shared, workspace)
        return workspace.sums

    # prepare.cu

    def _prepare(self, v: SimpleNamespace, x: np.ndarray, workspace: Workspace) -> np.ndarray:
        prepared = np.full((len(x), v.prepared_columns), np.nan)
        for p in v.preparations:
            assert p.column_begin % PREPARE_COLUMNS == 0 and 0 < p.column_end - p.column_begin <= PREPARE_COLUMNS
            sources = np.arange(p.column_end)
            if p.column_list != ABSENT:
                sources = self._take("columns", p.column_list, p.column_end)
            sources = sources[p.column_begin :]
            if p.at != ABSENT:
                assert p.at % 8 == 0 and np.isnan(prepared[:, p.at : p.at + len(sources)]).all()
                prepared[:, p.at + len(sources) : p.at + -(-len(sources) // GRANULE) * GRANULE] = 0
                prepared[:, p.at : p.at + len(sources)] = (x * self._norm(p.scale, x.shape[1], 1))[:, sources]
            if p.dot != ABSENT:
                products = (x * self._norm(p.shift, x.shape[1], 1))[:, sources]
                workspace.store(p.dot, products.sum(1, keepdims=True))
        return prepared

    # sliced.cuh

    def _sliced(self, job: Job, acts: np.ndarray, octets: int, shared: Shared, workspace: Workspace) -> None:
        if shared.held != (job.book,):  # else left by the job before
            for plane, at in enumerate([job.book, job.res_book][: job.width // 8]):
                shared.put(plane * (SLICE_ROWS // 2) + np.arange(job.book_rows), self._book(at, job.book_rows))
            shared.held = (job.book,)
        tiles = SPAN_TILES // octets
        shared.spoil(SLICE_ROWS, octets * tiles * TILE_ROWS)
        first_tile, last_tile = job.column_begin // TILE_COLUMNS, -(-job.column_end // TILE_COLUMNS)
        tile, column = np.full((tiles * TILE_ROWS, acts.shape[1]), np.nan), np.arange(len(acts))
        tile[column + column // TILE_COLUMNS * 8] = acts
        tile[np.arange(tiles) * TILE_ROWS + TILE_COLUMNS] = 0
        for row in range(job.row_begin, job.row_end):
            at, slice_row = self._entries(job, row, first_tile, last_tile)
            at = at - first_tile % SPAN_TILES * TILE_ROWS
            assert (at >= 0).all()
            for plane in range(job.width // 8):
                sums = tile[at].T @ shared.rows[plane * (SLICE_ROWS // 2) + slice_row]
                workspace.store(job.out + row * job.width + plane * 8, sums)

    def _entries(self, job: Job, row: int, first_tile: int, last_tile: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the entries of lists, padding included: the column as a row of shared memory, and the row of the slice."""
        assert 0 <= first_tile <= last_tile <= job.list_tiles
        begin, *_, end = self._take("codes", job.lists + row * job.list_tiles + first_tile, last_tile - first_tile + 1)
        words = self._take("codes", job.codes + begin * 32, (end - begin) * 32).reshape(-1, 32)
        return (words >> 19).reshape(-1), (words[:, LANE_OF_ROW] >> 2 & (SLICE_ROWS - 1)).reshape(-1)

    # resident.cuh

    def _resident(self, job: Job, acts: np.ndarray, octets: int, shared: Shared, workspace: Workspace) -> None:
        base = 2 * WARPS * 128 * 4 * octets // 16
        shared.held = ()
        shared.spoil(0, base)
        self._fill_images(job, shared, base)
        columns = STEPS[Kind(job.kind)] * 16
        first, loads = job.column_begin // columns, -(-len(acts) // columns)
        code = self._codes(job, range(job.row_begin, job.row_end))
        code = code[:, first * columns // 16 : (first + loads) * columns // 16]
        assert code.shape[1] * 16 == loads * columns
        self._store(job, acts, self._look_up(job, code, shared, base), workspace)

    def _fill_images(self, job: Job, shared: Shared, base: int) -> None:
        books, copies = [(job.book, job.book_rows), (job.res_book, job.res_rows)], job.copies
        if job.kind == Kind.FAR_BYTES:
            books, copies = books[1:], 8
        for at, rows in books if job.kind == Kind.BYTE_PAIRS else books[:1]:
            book, row = self._book(at, rows), np.arange(rows)
            for i in range(copies):
                place = image_row(row, i, rows) if job.kind == Kind.SHORTS else row * 8 + (i + row) % 8
                shared.put(base + place, book)
            base += round8(rows) * copies

    def _codes(self, job: Job, tiles: range, residual: bool = False) -> np.ndarray:
        """Codes ``[tiles, steps, 32]`` of all columns."""
        kind, at, row_words = Kind(job.kind), job.codes, job.row_words
        if residual:
            kind, at, row_words = Kind.BYTES, job.lists, job.list_tiles
        lanes = LANES // 2 if job.width == 16 else LANES  # of which two share a load where they look up halves
        size = (lanes.max() + 1) * 4
        assert at % 4 == 0 and row_words % size == 0  # a lane loads four words
        words = self._take("codes", at + tiles.start * row_words, len(tiles) * row_words)
        per_word = STEPS[kind] // 4
        bits = 32 // per_word
        code = words.reshape(len(tiles), -1, size // 4, 4, 1)[:, :, lanes] >> bits * np.arange(per_word) & (
            (1 << bits) - 1
        )
        return code.reshape(*code.shape[:3], -1).swapaxes(2, 3).reshape(len(tiles), -1, 32)

    def _look_up(self, job: Job, code: np.ndarray, shared: Shared, base: int) -> np.ndarray:
        """Vectors ``[tiles, steps, 32, 8]`` out of images."""
        if job.kind == Kind.SHORTS:
            return shared.rows[base + code]
        values = shared.rows[base + (code & 0xFF) * 8 + LANES % 8]
        if job.kind == Kind.BYTE_PAIRS:
            values = values + shared.rows[base + round8(job.book_rows) * job.copies + (code >> 8) * 8 + LANES % 8]
        return values

    def _store(self, job: Job, acts: np.ndarray, vectors: np.ndarray, workspace: Workspace) -> None:
        """Sums of vectors ``[tiles, steps, 32, 8]``: lanes 0-7 and 16-23 are columns 0-15 of a step for 8 outputs."""
        sums = []
        for half in range(2):
            mine = vectors[:, :, half == LANES // 8 % 2].reshape(len(vectors), -1, 8)
            padding = np.zeros((mine.shape[1] - len(acts), acts.shape[1]))
            sums.append(np.concatenate([acts, padding]).T @ mine)
        flat = np.stack(sums, 2).swapaxes(0, 1).reshape(acts.shape[1], -1)
        workspace.store(job.out + job.row_begin * TILE_OUTPUTS, flat)

    # wide.cuh

    def _wide(self, job: Job, acts: np.ndarray, images: int, shared: Shared, workspace: Workspace) -> None:
        first, granules = job.column_begin // GRANULE, -(-len(acts) // GRANULE)
        held = (job.book, job.res_book)
        if job.kind == Kind.FAR:
            shared.held = ()
        elif shared.held != held:
            shared.held = held
            self._fill_images(job, shared, images)

        def codes(residual: bool = False) -> np.ndarray:
            """Of whole granules: zeros behind the end."""
            code = self._codes(job, range(job.row_begin, job.row_end), residual)[:, first * 16 :][:, : granules * 16]
            missing = granules * 16 - code.shape[1]
            assert 0 <= missing < 16
            return np.pad(code, ((0, 0), (0, missing), (0, 0)))

        if job.kind in (Kind.FAR, Kind.FAR_BYTES):
            residual = round8(job.res_rows) * 8 if job.kind == Kind.FAR_BYTES else 0
            shared.spoil(images + residual, 12 * GATHERED_BYTES // 16)
            vectors = self._gather(job, codes())
            if job.kind == Kind.FAR_BYTES:
                assert job.width == 8 and job.list_tiles
                vectors = vectors + shared.rows[images + codes(residual=True) * 8 + LANES % 8]
        else:
            vectors = self._look_up(job, codes(), shared, images)
        self._store(job, acts, vectors, workspace)

    def _gather(self, job: Job, code: np.ndarray) -> np.ndarray:
        """Vectors ``[tiles, steps, 32, 8]`` from memory, in the order that ldmatrix reads them."""
        to, half = LANES, 0 * LANES
        if job.width == 16:
            to, half = LANES // 2 % 8 + LANES % 2 * 8 + LANES // 16 * 16, LANES % 2
        assert job.plane + half.max() < job.copies and code.max() < job.book_rows
        ring = np.full((*code.shape, 8), np.nan)
        ring[:, :, to] = self._book(job.book, job.book_rows * job.copies)[code * job.copies + job.plane + half]
        return ring

    # finish.cu

    def _finish(self, v: SimpleNamespace, workspace: np.ndarray) -> np.ndarray:
        y = np.full((len(workspace), self.plan.out_features), np.nan)
        for m in v.modules:
            if m.dense:
                continue
            n, product = np.arange(m.out_end - m.out_begin), 0
            for part in v.parts[m.part_begin : m.part_end]:
                vector_row, element = np.divmod(n + part.skip, part.vector_len)
                within = element - part.plane * 8
                mine = (within >= 0) & (within < part.width)
                sums, splits = vector_row * part.width + within, np.full(len(n), part.splits)
                if part.counts != ABSENT:
                    splits = self._take("work", part.counts, (vector_row.max() * part.width) // COUNTED_SUMS + 1)
                    splits = splits[vector_row * part.width // COUNTED_SUMS]
                    assert ((splits > 0) & (splits <= part.splits)).all()
                for s in range(part.splits):
                    there = np.flatnonzero(mine & (s < splits))
                    at = part.out + sums[there] + s * part.stride
                    added = np.zeros((len(y), len(n)))
                    added[:, there] = workspace[:, at]
                    product = product + added
            dot = workspace[:, m.dot : m.dot + m.dots].sum(1, keepdims=True)
            shift = self._norm(ABSENT if m.scale == ABSENT else m.shift, len(n), 1)
            y[:, m.out_begin : m.out_end] = product * self._norm(m.scale, len(n), 1) + dot * shift
        return y

    # decode.cu

    def _decode(self, index: int, m: Module, begin: int, end: int) -> np.ndarray:
        """Outputs ``[begin, end)`` of a module."""
        weight = np.full((end - begin, self.plan.in_features), np.nan)
        for d in self.plan.decodings:
            if d.module != index:
                continue
            job, length, skip = d.job, d.part.vector_len, d.part.skip
            per_tile = length if job.width == 16 else 2 * length
            tiles = range((begin + skip) // per_tile, min(-(-(end + skip) // per_tile), job.row_end))
            if not tiles:
                continue
            pairs = job.kind == Kind.BYTE_PAIRS
            vectors = self._named_vectors(job, tiles, job.book, job.book_rows, 0)
            if pairs:
                vectors += self._named_vectors(job, tiles, job.res_book, job.res_rows, 1)
            if d.residual.kind != ABSENT:
                residual = d.residual
                assert residual.column_end == job.column_end and residual.width == job.width and not pairs
                vectors += self._named_vectors(residual, tiles, residual.book, residual.book_rows, 0)
            # ldmatrix.trans: element lane / 4 of the vectors that two lanes of each of the four matrices name.
            mine = np.arange(8) // 2 * 8 + LANES[:, None] % 4 * 2 + np.arange(8) % 2
            vectors = vectors[:, :, :, mine, LANES[:, None] // 4]
            row, strip, half, lane, place = np.ogrid[tuple(slice(n) for n in vectors.shape)]
            row += tiles.start
            element = job.plane * 8 + lane // 4 + (half * 8 if job.width == 16 else 0)
            output = (row if job.width == 16 else 2 * row + half) * length + element - skip
            column = strip * STRIP_COLUMNS + lane % 4 * 8 + place
            kept = (element < length) & (output >= begin) & (output < end) & (column < job.column_end)
            output, column = (np.broadcast_to(a, kept.shape)[kept] for a in (output, column))
            source, value = self._sources(job)[column], vectors[kept]
            if job.scale != ABSENT:
                value = value * self._norm(job.scale, weight.shape[1], 1)[source]
                value += self._norm(job.shift, weight.shape[1], 0)[source]
            if m.scale != ABSENT:
                size = m.out_end - m.out_begin
                value = value * self._norm(m.scale, size, 1)[output] + self._norm(m.shift, size, 0)[output]
            left = np.isnan(weight).sum()
            weight[output - begin, source] = value
            assert np.isnan(weight).sum() == left - len(value), "a weight was written twice, or from nowhere"
        return weight

    def _named_vectors(self, job: Job, tiles: range, book: int, book_rows: int, second: int) -> np.ndarray:
        """Vectors ``[tiles, strips, 2, 32, 8]`` as the lanes of ldmatrix name them, of two vector rows or halves."""
        kind, wide = Kind(job.kind), job.width == 16
        tile, strip, load, lane = np.ogrid[tiles.start : tiles.stop, : -(-job.column_end // STRIP_COLUMNS), :2, :32]
        named = lane // 2 if wide else lane
        row = named % 8  # of a matrix
        of_codes = row // 2 % 2 * (8 if wide else 16) + named // 8 * 2 + row % 2 + load * (4 if wide else 8)
        per_load, word = (8, strip % 8 // 2) if kind == Kind.BYTES else (4, strip % 4)
        at = tile * job.row_words + (strip // per_load * (16 if wide else 32) + of_codes) * 4 + word
        assert at.min() >= 0 and (at < (tile + 1) * job.row_words).all()
        words = self._take("codes", job.codes, at.max() + 1)[at]
        if kind in (Kind.BYTES, Kind.BYTE_PAIRS):
            byte = strip % 2 * 2 + row // 4 if kind == Kind.BYTES else row // 4 * 2 + second
            entry = words >> 8 * byte & 0xFF
        else:
            entry = words >> 16 * (row // 4) & 0xFFFF
        if kind == Kind.FAR:
            plane = job.plane + (lane % 2 if wide else 0 * lane)
            assert plane.max() < job.copies
            vectors = self._book(book, book_rows * job.copies)[entry * job.copies + plane]
            # The halves of an entry, which neighbouring lanes copy, are of different outputs.
            return vectors.reshape(*entry.shape[:2], 32, 2, 8).swapaxes(2, 3) if wide else vectors
        return self._book(book, book_rows)[entry_of_image_row(entry, book_rows) if kind == Kind.SHORTS else entry]


def decoded_by(block: int, blocks: int, spans: int, rows: int) -> Iterator[tuple[int, range]]:
    """Spans and their rows that a thread block of decode.cu takes of a decoding."""
    together = blocks // spans
    others = blocks - together * spans
    shared_rows = rows * (blocks - others) // blocks
    if block < together * spans:
        yield block % spans, range(block // spans, shared_rows, together)
        return
    own_rows, other = rows - shared_rows, block - together * spans
    unit, last = (spans * own_rows * i // others for i in (other, other + 1))
    while unit < last:
        span, row = divmod(unit, own_rows)
        end = min(last, unit - row + own_rows)
        yield span, range(shared_rows + row, shared_rows + row + end - unit)
        unit = end


def _ring_rows(tokens: int, kind: int) -> int:
    """Of the ring of activations in wide.cuh, behind which books lie."""
    large = tokens == 128 and kind not in (Kind.SHORTS, Kind.DOT)
    return (LARGE_RING_BYTES if large else RING_BYTES) // 16


class Workspace:
    """Sums ``[tokens, stride]``."""

    def __init__(self, tokens: int, stride: int) -> None:
        self.sums, self.written = np.full((tokens, stride), np.nan), np.zeros((tokens, stride), bool)

    def store(self, at: int, sums: np.ndarray, token: int = 0) -> None:
        where = slice(token, token + len(sums)), slice(at, at + sums.shape[1])
        assert at >= 0 and where[1].stop <= self.sums.shape[1] and not self.written[where].any()
        self.written[where], self.sums[where] = True, sums


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
    "v6-k4096": dict(vector_len=6, num_centroids=4096),
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


@pytest.mark.parametrize("name", ["v8-k65536-256", "v8-k256-256", "v12-k4096-64", "v6-k4096", "v20-k16384-65536"])
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
        ("v8-k8192 v6-k4096", Kind.SHORTS, 0, None),
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
@pytest.mark.parametrize("name", ["v8-k256-256", "v6-k4096", "v12-k4096-64", "v20-k512-4"])
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
