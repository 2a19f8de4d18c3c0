"""The CUDA ops that pack the stationary layout, for the CPU; the plan as the C++ side reads it, and its limits.

Importing this file registers ``pack_sliced`` and ``pack_resident`` for the CPU. What they may choose is random here:
the order of the entries of a list, and the image of a book that a code names. So whoever reads the result can only rely
on what every packing has in common.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import vllm_vptq.gpu  # noqa: F401  # defines the ops
from vllm_vptq.layouts import work
from vllm_vptq.layouts.work import ABSENT, Kind

WARPS, WARP_COLUMNS, SHARED_BYTES = 16, 256, 227 * 1024
OWN_SHARED_BYTES = 1024
"""At most, of what a block has, for the job, barriers and alignment."""
SLICE_ROWS = 8192
TILE_COLUMNS, TILE_ROWS, SPAN_TILES = 2048, 2056, 2
STEPS = {Kind.BYTES: 16, Kind.BYTE_PAIRS: 8, Kind.SHORTS: 8, Kind.FAR: 8, Kind.FAR_BYTES: 8}
"""Of 16 columns, whose codes for 16 outputs a warp loads at once: 16 bytes a lane."""
GRANULE, TILE_OUTPUTS, COUNTED_SUMS = 256, 16, 64
RING_BYTES, LARGE_RING_BYTES, GATHERED_BYTES = 32 * 1024, 64 * 1024, 8 * 1024
"""Of activations in wide.cuh, and for 128 tokens where there is room; of vectors that a warp gathers for a granule."""
LANES = np.arange(32)
LANE_OF_ROW = LANES & ~24 | (LANES & 8) << 1 | (LANES & 16) >> 1
HIGH, LOW = 0xFFF80000, 0x7FFFF
"""The bits of an entry with its column, and those with its row of the slice."""

# ---------------------------------------------------------------------------------------------------------------
# Packing


def stream(words: Tensor, columns: int, bits: int, shift: int, width: int) -> np.ndarray:
    """``width`` bits at ``shift`` of the merged indices, ``[rows, columns]``, as csrc/cuda/stream.cuh reads them.

    It reads one word more than there are; where the storage has none, as_strided raises.
    """
    rows, row_words = words.shape
    assert words.is_contiguous() and 1 <= bits <= 32
    flat = torch.as_strided(words, (words.numel() + 1,), (1,)).numpy().view(np.uint32).astype(np.uint64)
    at = np.arange(columns) * bits
    first = np.arange(rows)[:, None] * row_words + at // 32
    merged = (flat[first] | flat[first + 1] << np.uint64(32)) >> (at % 32).astype(np.uint64)
    return (merged >> np.uint64(shift)).astype(np.int64) & ((1 << width) - 1)


def pack_sliced(
    words: Tensor, columns: int, bits: int, shift: int, width: int, slice_bits: int, slices: int, tiles: int
) -> tuple[Tensor, Tensor]:
    """Lists ``[slices, rows, tiles]`` of entries, and where each begins, in groups of 32 entries."""
    index, rows = stream(words, columns, bits, shift, width), words.shape[0]
    row, column = (a.reshape(-1) for a in np.indices(index.shape))
    index = index.reshape(-1)
    key = ((index >> slice_bits) * rows + row) * tiles + column // TILE_COLUMNS
    counts = np.bincount(key, minlength=slices * rows * tiles)
    assert len(counts) == slices * rows * tiles, "an index beyond the slices, or a column beyond the tiles"
    offsets = np.concatenate([[0], np.cumsum(-(-counts // 32))])
    # Padding everywhere at first: the row of zeros behind a tile's activations.
    tile = np.repeat(np.arange(len(counts)) % tiles, np.diff(offsets) * 32)
    entries = (tile % SPAN_TILES * TILE_ROWS + TILE_COLUMNS) << 19
    order = np.lexsort((np.random.default_rng(0).permutation(len(key)), key))
    place = offsets[key[order]] * 32 + np.arange(len(key)) - (np.cumsum(counts) - counts)[key[order]]
    made = (column // TILE_COLUMNS % SPAN_TILES * TILE_ROWS + column % TILE_COLUMNS) << 19
    entries[place] = (made | (index & ((1 << slice_bits) - 1)) << 2)[order]
    groups = entries.reshape(-1, 32)
    return _int32((groups & HIGH) | (groups[:, LANE_OF_ROW] & LOW)), _int32(offsets)


def pack_resident(
    words: Tensor,
    columns: int,
    bits: int,
    shift: int,
    width: int,
    res_shift: int,
    res_width: int,
    kind: int,
    loads: int,
    book_rows: int,
    copies: int,
    vector_width: int,
) -> Tensor:
    """Codes in the order that lanes load them: ``[ceil(rows / 2), loads, 32, 4]``.

    Of a ``vector_width`` of 16 ``[rows, loads, 16, 4]``: two lanes load the same.
    """
    rows, steps = words.shape[0], STEPS[Kind(kind)]
    assert columns <= loads * steps * 16 and vector_width in (8, 16)
    assert vector_width == 8 or kind == Kind.FAR
    tiles = -(-rows * vector_width // 16)
    whole = np.zeros((tiles * 16 // vector_width, loads * steps * 16), np.int64)
    place = resident_place(np.arange(tiles), loads, steps, vector_width)
    whole[:rows, :columns] = stream(words, columns, bits, shift, width)
    code = whole[place]
    assert kind == Kind.FAR or code.max() < book_rows
    if kind == Kind.SHORTS:
        image = np.random.default_rng(0).integers(copies, size=code.shape)
        code = np.choose(image, [image_row(code, i, book_rows) for i in range(copies)])
    if kind == Kind.BYTE_PAIRS:
        whole[:rows, :columns] = stream(words, columns, bits, res_shift, res_width)
        code |= whole[place] << 8
    per_word = steps // 4
    if vector_width == 16:
        assert (code[:, :, ::2] == code[:, :, 1::2]).all()
        code = code[:, :, ::2]
    code = code.reshape(*code.shape[:3], 4, per_word)
    return _int32((code << 32 // per_word * np.arange(per_word)).sum(-1))


def resident_place(tiles: np.ndarray, loads: int, steps: int, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Vector row and column of the codes ``[tiles, loads, 32, steps]`` of 16 outputs each, to be broadcast."""
    row = 16 // width * tiles[:, None, None, None] + (LANES >> 3 & 1 if width == 8 else 0 * LANES)[:, None]
    step = np.arange(loads * steps).reshape(1, loads, 1, steps)
    return row, step * 16 + (LANES % 8 + LANES // 16 * 8 if width == 8 else LANES // 2)[:, None]


def bank_mask(row: np.ndarray, image: np.ndarray | int) -> np.ndarray:
    """What entries exchange their banks by: 0 in the first of three images, and never alike in two."""
    first = 1 + ((row >> 3 & 7) * 7 >> 3)
    second = 1 + ((row >> 6 & 7) * 6 >> 3)
    return np.choose(image, [0 * row, first, second + (second >= first)])


def image_row(row: np.ndarray, image: int, rows: int) -> np.ndarray:
    """Row of shared memory of entry ``row`` in image ``image`` of a book of ``rows``."""
    return image * round8(rows) + (row ^ bank_mask(row, image))


def entry_of_image_row(at: np.ndarray, rows: int) -> np.ndarray:
    """The inverse, for any image."""
    image, row = np.divmod(at, round8(rows))
    entry = row ^ bank_mask(row, image)
    assert entry.size == 0 or entry.max() < rows
    return entry


def round8(n: int) -> int:
    return -(-n // 8) * 8


def _int32(values: np.ndarray) -> Tensor:
    assert values.size == 0 or (values.min() >= 0 and values.max() < 1 << 32)
    return torch.from_numpy(values.astype(np.uint32).view(np.int32).reshape(-1).copy())


_library = torch.library.Library("vllm_vptq", "IMPL", "CPU")
for _op in (pack_sliced, pack_resident):
    # An op can have one implementation in a process, and a module be imported twice.
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_vptq::{_op.__name__}", "CPU"):
        _library.impl(_op.__name__, _op)

# ---------------------------------------------------------------------------------------------------------------
# Plan

_SIZES = {work.Job: 25, work.Part: 8, work.Module: 9, work.Preparation: 7}


class Plan:
    """The plan and the records in ``work``, read as csrc/bindings.cpp does."""

    def __init__(self, words: list[int], numbers: list[int]) -> None:
        rest = iter(numbers)

        def take(*names: str) -> SimpleNamespace:
            return SimpleNamespace(**{name: next(rest) for name in names})

        def here(kind: type, count: int) -> list:
            return [kind(*(next(rest) for _ in range(_SIZES[kind]))) for _ in range(count)]

        def stored(kind: type, at: int, count: int) -> list:
            size = _SIZES[kind]
            assert at >= 0 and at + count * size <= len(words)
            return [kind(*words[i : i + size]) for i in range(at, at + count * size, size)]

        head = take("stationary", "out_features", "in_features", "shared_bytes", "direct_tokens")
        self.stationary, self.direct_tokens = bool(head.stationary), head.direct_tokens
        self.out_features, self.in_features, self.shared_bytes = head.out_features, head.in_features, head.shared_bytes
        sizes = take("variants", "modules")
        self.variants = []
        for _ in range(sizes.variants):
            v = take("max_tokens", "stride", "modules_at", "parts_at")
            placed = take("preparations_at", "preparations", "prepared_columns")
            v.launches = [take("wide", "jobs_at", "starts_at", "thread_blocks") for _ in range(next(rest))]
            parts = next(rest)
            v.prepared_columns = placed.prepared_columns
            v.preparations = stored(work.Preparation, placed.preparations_at, placed.preparations)
            v.modules, v.parts = here(work.Module, sizes.modules), here(work.Part, parts)
            # On the device too, for layers of many modules.
            assert v.modules == stored(work.Module, v.modules_at, sizes.modules)
            assert v.parts == stored(work.Part, v.parts_at, parts)
            for launch in v.launches:
                starts = words[launch.starts_at : launch.starts_at + launch.thread_blocks + 1]
                assert len(starts) == launch.thread_blocks + 1 and starts[0] == 0 and starts == sorted(starts)
                jobs = stored(work.Job, launch.jobs_at, starts[-1])
                launch.jobs = [jobs[lo:hi] for lo, hi in pairwise(starts)]
            self.variants.append(v)
        self.decodings = [
            SimpleNamespace(
                module=next(rest), job=here(work.Job, 1)[0], residual=here(work.Job, 1)[0], part=here(work.Part, 1)[0]
            )
            for _ in range(next(rest))
        ]
        self.dense = [take("out_begin", "rows", "offset") for _ in range(next(rest))]
        assert next(rest, None) is None

    def check_limits(self, processors: int) -> None:
        """What the kernels of the stationary layout count on without looking."""
        assert self.stationary and self.shared_bytes % 16 == 0
        assert self.shared_bytes + OWN_SHARED_BYTES <= SHARED_BYTES
        for v in self.variants:
            assert v.max_tokens in (8, 16, 32, 64, 128)
            assert v.stride % 2 == 0  # sums are stored in pairs
            _check_dots(v, [job for launch in v.launches for job in flat(launch) if job.dot != ABSENT])
            assert 1 <= len(v.launches) <= 2 and all(launch.wide != ABSENT for launch in v.launches[1:])
            for launch in v.launches:
                assert 0 < len(launch.jobs) <= processors and all(launch.jobs)
                jobs = flat(launch)
                for job in jobs:
                    assert 0 <= job.row_begin < job.row_end and 0 <= job.column_begin < job.column_end
                if launch.wide == ABSENT:
                    assert v.max_tokens <= 16
                    _check_few(v.max_tokens, jobs)
                else:
                    _check_wide(v, launch.wide, jobs)
        assert all(a.max_tokens < b.max_tokens for a, b in pairwise(self.variants))
        for d in self.decodings:
            assert d.job.width == 8 or (d.job.kind == Kind.FAR and d.residual.kind in (Kind.FAR, ABSENT))
            assert d.job.kind != Kind.BYTE_PAIRS or d.residual.kind == ABSENT
            assert d.residual.kind == ABSENT or d.residual.width == d.job.width


def flat(launch: SimpleNamespace) -> list[work.Job]:
    """The jobs of all thread blocks."""
    return [job for jobs in launch.jobs for job in jobs]


def _check_dots(v: SimpleNamespace, jobs: list[work.Job]) -> None:
    """Every part of the product once: by the first job of a list's columns, or before."""
    parts = sorted(m.dot + i for m in v.modules for i in range(m.dots))
    assert len(set(parts)) == len(parts) and all((m.dot == ABSENT) == (m.dots == 0) for m in v.modules)
    made = [job.dot for job in jobs if job.row_begin == 0]
    made += [p.dot for p in v.preparations if p.dot != ABSENT]
    assert sorted(made) == parts
    assert not jobs or (v.max_tokens <= 8 and all(job.kind == Kind.SLICED for job in jobs))


def _check_few(max_tokens: int, jobs: list[work.Job]) -> None:
    """multiply.cu"""
    step = TILE_COLUMNS * (2 if max_tokens == 8 else 1)
    for job in jobs:
        columns = job.column_end - job.column_begin
        assert job.out % 2 == 0
        if job.kind == Kind.SLICED:
            assert job.codes % 32 == 0  # what a warp loads of a list is one line of the caches
            assert columns <= step and job.column_begin % step == 0
            assert (job.width, job.res_book == ABSENT) in ((8, True), (16, False))
            assert job.book_rows <= SLICE_ROWS * 8 // job.width
        else:
            assert job.width == 8
            assert job.kind in (Kind.BYTES, Kind.BYTE_PAIRS, Kind.SHORTS)
            assert columns <= WARPS * WARP_COLUMNS and job.column_begin % (STEPS[Kind(job.kind)] * 16) == 0


def _check_wide(v: SimpleNamespace, wide: int, jobs: list[work.Job]) -> None:
    """wide.cuh: each strip of outputs comes in pieces by columns, whose sums are splits 0, 1, .. of a part."""
    assert wide == (jobs[0].kind if len({job.kind for job in jobs}) == 1 else Kind.DOT)
    most = wide_tiles(v.max_tokens, wide)
    strips: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for job in jobs:
        assert job.row_begin % most == 0 and job.row_end <= job.row_begin + most
        assert job.column_begin % GRANULE == 0 and (job.scale == ABSENT or job.scale % 4 == 0)  # loaded by four
        assert job.width == 8 or (job.kind == Kind.FAR and job.width == 16)
        if job.source != ABSENT:
            assert job.source % 8 == 0 and job.scale == job.column_list == ABSENT
        (p,) = (i for i, part in enumerate(v.parts) if 0 <= job.out - part.out < part.splits * part.stride)
        split, rest = divmod(job.out - v.parts[p].out, v.parts[p].stride)
        assert rest == 0 and job.row_end * TILE_OUTPUTS <= v.parts[p].stride and job.width == v.parts[p].width
        strips.setdefault((p, job.row_begin), []).append((job.column_begin, job.column_end, split))
    for pieces in strips.values():
        pieces.sort()
        assert [lo for lo, _, _ in pieces] == [0, *(hi for _, hi, _ in pieces[:-1])]
        assert sorted(split for _, _, split in pieces) == list(range(len(pieces)))
    for p in {p for p, _ in strips}:
        part, counts = v.parts[p], [len(pieces) for (q, _), pieces in sorted(strips.items()) if q == p]
        assert part.splits == max(counts) and (part.counts != ABSENT or min(counts) == max(counts))


def wide_tiles(tokens: int, kind: int) -> int:
    """Tiles of 16 outputs that a block of wide.cuh computes at once."""
    return 16 if tokens <= 32 and kind in (Kind.BYTES, Kind.BYTE_PAIRS, Kind.SHORTS) else 12


class Shared:
    """Shared memory of a thread block, in rows of 16 bytes."""

    def __init__(self, size: int) -> None:
        self.rows = np.full((size // 16, 8), np.nan)
        self.held: tuple[int, ...] = ()

    def put(self, at: np.ndarray, values: np.ndarray) -> None:
        assert at.max() < len(self.rows), "beyond the shared memory of a block"
        self.rows[at] = values

    def spoil(self, begin: int, size: int) -> None:
        """Something else is stored to ``size`` rows."""
        assert begin + size <= len(self.rows), "beyond the shared memory of a block"
        self.rows[begin : begin + size] = np.nan
