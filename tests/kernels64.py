"""csrc/cuda's kernels of the stationary and the aligned layout done in float64, without a GPU.

``Kernels`` gets what the CUDA kernels get, the tensors of a layout and the plan, and works off every thread block's
jobs one after another. Memory that nobody has written is NaN; an address outside of a tensor or of shared memory, and
a second write to a place of the workspace or of the weight, fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch

from tests.packers import (
    COUNTED_SUMS,
    GATHERED_BYTES,
    GRANULE,
    LANE_OF_ROW,
    LANES,
    LARGE_RING_BYTES,
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
    image_row,
    round8,
)
from vllm_vptq.layouts.work import ABSENT, PREPARE_COLUMNS, Job, Kind, LookupLayout, Module

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
