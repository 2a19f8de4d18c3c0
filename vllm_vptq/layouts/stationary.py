"""The stationary layout: books lie still in shared memory, indices are sorted and packed for them at load.

Every segment becomes one or more *passes*, each over one book and eight elements of its vectors (a *plane*), because
16 bytes are what shared memory hands out at once. Kinds of passes, by the size of the book (docs/kernels.md):

* up to 256 entries: codes of one byte, eight images of the book, look-ups without bank conflicts. A residual book as
  small rides along;
* up to 8192: codes of two bytes, that name one of up to three images of an entry;
* above: the book is cut into slices of 8192 entries, and the indices of a vector row are sorted into a list for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from vllm_vptq.layouts import work
from vllm_vptq.layouts.flat import Flat
from vllm_vptq.layouts.work import ABSENT, Job, Kind, LayerWork, LookupLayout, Module, Part, Unit, Variant
from vllm_vptq.parameters import ModuleShard, Segment

SLICE_BITS = 13
SLICE_ROWS = 1 << SLICE_BITS
TILE_COLUMNS = 2048
SPAN_COLUMNS = 2 * TILE_COLUMNS
WARPS = 16
WARP_COLUMNS = 256
"""Columns of a resident pass whose activations a warp holds."""
COLUMNS_PER_LOAD = {Kind.BYTES: 256, Kind.BYTE_PAIRS: 128, Kind.SHORTS: 128}
"""Columns whose codes, for a pair of rows, a warp gets by one load of 16 bytes a lane."""
EXCHANGE_BYTES = 32 * 1024
"""Buffers in which sums of the warps are added."""
IMAGE_BYTES = 192 * 1024
"""For images of a large book: of the 227 KiB a block can have, less the buffers."""
SLICED_BYTES = (SLICE_ROWS + 2 * (TILE_COLUMNS + 8)) * 16
"""A slice and activations."""
CLASSES = ("stationary unaligned", "stationary sliced", "stationary resident")
"""Of layers, by how fast their weights are decoded; the slowest first."""
DECODES_WELL = CLASSES[-1]
TOKENS = (8, 16)
"""Most tokens of a call, one entry per variant."""


@dataclass(frozen=True)
class Pass:
    """One book, one plane of it, and the codes to look up in it."""

    kind: Kind
    segment: Segment
    plane: int
    residual: bool
    codes: int
    row_words: int
    book: int
    book_rows: int
    res_book: int = ABSENT
    res_rows: int = 0
    copies: int = 1
    lists: int = 0

    @property
    def slices(self) -> int:
        return -(-self.book_rows // SLICE_ROWS) if self.kind == Kind.SLICED else 1

    @property
    def rows(self) -> int:
        return self.segment.words.shape[0]

    @property
    def shared_bytes(self) -> int:
        return SLICED_BYTES if self.kind == Kind.SLICED else EXCHANGE_BYTES + self.images_bytes

    @property
    def images_bytes(self) -> int:
        return (_round8(self.book_rows) + _round8(self.res_rows)) * 16 * self.copies


def build(
    shards: Sequence[ModuleShard], dtype: torch.dtype, device: torch.device, processors: int, direct_tokens: int
) -> LookupLayout:
    """Packs the shards of a layer, whose outputs follow each other, for a GPU with ``processors`` multiprocessors.

    ``books`` are rows of 8 elements, in as many planes as a vector needs.
    Calls of up to ``direct_tokens`` look weights up; larger ones decode them and leave the product to cuBLAS.
    """
    codes, books = Flat(torch.int32), Flat(dtype)
    norm, columns, dense = Flat(torch.float32), Flat(torch.int32), Flat(dtype)
    variants = [Variant(tokens) for tokens in TOKENS]
    units: list[list[Unit]] = [[] for _ in variants]
    decodings: list[list[Job]] = []
    dense_modules: list[tuple[int, int, int]] = []
    shared, start = 0, 0
    for shard in shards:
        end, place = start + shard.out_features, _norm_place(shard, norm)
        first_part = len(decodings)
        if shard.dense is not None:
            dense_modules.append((start, shard.out_features, dense.add(shard.dense)))
        for segment in shard.segments:
            column_list = ABSENT if segment.columns is None else columns.add(segment.columns)
            for pass_ in _passes(segment, codes, books):
                shared = max(shared, pass_.shared_bytes)
                for variant, list_ in zip(variants, units, strict=True):
                    list_ += _units(pass_, variant, place, column_list, processors)
                decodings.append(_decoding_jobs(pass_, place, column_list, processors))
        for variant, list_ in zip(variants, units, strict=True):
            module, dot = _module(shard, start, end, (first_part, len(decodings)), place, variant)
            variant.modules.append(module)
            list_ += dot
        start = end
    for variant, list_ in zip(variants, units, strict=True):
        variant.jobs = work.cut(list_, processors)
    layer = LayerWork(
        stationary=True,
        out_features=start,
        in_features=shards[0].in_features,
        shared_bytes=max(shared, 1024),
        direct_tokens=direct_tokens,
        variants=variants,
        decodings=decodings,
        dense=dense_modules,
    )
    work_tensor, plan = layer.encode(device)
    return LookupLayout(
        codes=codes.tensor(device),
        books=books.tensor(device),
        norm=norm.optional(),
        columns=columns.optional(),
        dense=dense.optional(),
        work=work_tensor,
        plan=plan,
    )


def crossover_class(shards: Sequence[ModuleShard]) -> str:
    """Which entry of crossovers.json applies to a layer: that of its part which is slowest to decode."""
    segments = [segment for shard in shards for segment in shard.segments]
    classes = {class_of(s.vector_len, 1 << max(s.index_bits, s.res_bits)) for s in segments}
    return next(name for name in CLASSES if name in classes or name == CLASSES[-1])


def class_of(vector_len: int, entries: int) -> str:
    """The class of a segment whose larger book has ``entries`` entries."""
    if vector_len % 8:
        return CLASSES[0]
    return CLASSES[1] if entries > SLICE_ROWS else CLASSES[2]


@dataclass(frozen=True)
class NormPlace:
    """Where a module's norm lies in the flat norm tensor: scale, then shift; ABSENT without one."""

    scale: int
    shift: int
    rows: bool

    @property
    def column_scale(self) -> int:
        return ABSENT if self.rows else self.scale

    @property
    def column_shift(self) -> int:
        return ABSENT if self.rows else self.shift


def _norm_place(shard: ModuleShard, norm: Flat) -> NormPlace:
    """Stores a shard's norm."""
    if shard.scale is None or shard.shift is None:
        return NormPlace(ABSENT, ABSENT, False)
    at = norm.add(torch.cat([shard.scale.float(), shard.shift.float()]))
    return NormPlace(at, at + shard.scale.numel(), shard.norm_dim == 1)


def _module(
    shard: ModuleShard,
    start: int,
    end: int,
    parts: tuple[int, int],
    place: NormPlace,
    variant: Variant,
) -> tuple[Module, list[Unit]]:
    """The record of a module, and the unit that computes its norm's dot product, if it needs one."""
    module = Module(start, end, *parts, dense=int(shard.dense is not None))
    if place.scale == ABSENT:
        return module, []
    module.dot = variant.reserve(1)
    if place.rows:
        module.scale, module.shift = place.scale, place.shift
    job = Job(Kind.DOT, column_end=shard.in_features, out=module.dot, shift=place.column_shift)
    cost = 2000 + variant.max_tokens * shard.in_features / 16
    return module, [Unit(job, rows=1, grain=1, cost=cost)]


def _passes(segment: Segment, codes: Flat, books: Flat) -> list[Pass]:
    """Packs a segment's indices and stores its books."""
    bits, rows = segment.index_bits + segment.res_bits, segment.words.shape[0]
    words = torch.cat([segment.words.flatten(), segment.words.new_zeros(1)])[:-1].view(rows, -1)
    passes = []
    for plane in range(-(-segment.vector_len // 8)):
        main = books.add(_plane(segment.book, plane))
        if segment.res_book is None or not segment.res_bits:
            passes.append(_pass(segment, plane, words, codes, main, segment.book, 0, segment.index_bits, False))
            continue
        residual = books.add(_plane(segment.res_book, plane))
        if segment.index_bits <= 8 and segment.res_bits <= 8:
            loads = -(-segment.num_columns // COLUMNS_PER_LOAD[Kind.BYTE_PAIRS])
            packed = torch.ops.vllm_vptq.pack_resident(
                words,
                segment.num_columns,
                bits,
                0,
                segment.index_bits,
                segment.index_bits,
                segment.res_bits,
                int(Kind.BYTE_PAIRS),
                loads,
                segment.book.shape[0],
                8,
            )
            passes.append(
                Pass(
                    Kind.BYTE_PAIRS,
                    segment,
                    plane,
                    False,
                    codes.add(packed),
                    loads * 128,
                    main // 8,
                    segment.book.shape[0],
                    residual // 8,
                    segment.res_book.shape[0],
                    8,
                )
            )
            continue
        passes.append(_pass(segment, plane, words, codes, main, segment.book, 0, segment.index_bits, False))
        passes.append(
            _pass(segment, plane, words, codes, residual, segment.res_book, segment.index_bits, segment.res_bits, True)
        )
    return passes


def _pass(
    segment: Segment, plane: int, words: Tensor, codes: Flat, at: int, book: Tensor, shift: int, width: int, res: bool
) -> Pass:
    """Packs one part of the merged indices: ``width`` bits at ``shift``."""
    bits, rows = segment.index_bits + segment.res_bits, book.shape[0]
    if rows > SLICE_ROWS:
        slices, tiles = -(-rows // SLICE_ROWS), -(-segment.num_columns // TILE_COLUMNS)
        entries, offsets = torch.ops.vllm_vptq.pack_sliced(
            words, segment.num_columns, bits, shift, width, slices, tiles
        )
        lists = codes.add(offsets)
        return Pass(Kind.SLICED, segment, plane, res, codes.add(entries), 0, at // 8, rows, lists=lists)
    kind = Kind.BYTES if width <= 8 else Kind.SHORTS
    copies = 8 if kind == Kind.BYTES else max(1, min(3, IMAGE_BYTES // (16 * _round8(rows))))
    loads = -(-segment.num_columns // COLUMNS_PER_LOAD[kind])
    packed = torch.ops.vllm_vptq.pack_resident(
        words, segment.num_columns, bits, shift, width, 0, 0, int(kind), loads, rows, copies
    )
    return Pass(kind, segment, plane, res, codes.add(packed), loads * 128, at // 8, rows, copies=copies)


def _plane(book: Tensor, plane: int) -> Tensor:
    """Elements ``8 * plane`` .. of every entry, as rows of 8. Pieces of a module share a book that has no others."""
    if book.shape[1] == 8 and book.is_contiguous():
        return book
    elements = book[:, 8 * plane : 8 * plane + 8]
    return torch.nn.functional.pad(elements, (0, 8 - elements.shape[1])).contiguous()


def _units(pass_: Pass, variant: Variant, place: NormPlace, column_list: int, processors: int) -> list[Unit]:
    """Cuts a pass by columns and slices, reserves its sums, and adds its part to the variant."""
    segment = pass_.segment
    ranges = _column_ranges(pass_, variant.max_tokens, processors)
    splits, sums = len(ranges) * pass_.slices, pass_.rows * 8 + 8  # pairs of rows: one more
    at = variant.reserve(splits * sums)
    paired = segment.res_book is not None and pass_.kind != Kind.BYTE_PAIRS
    added_to = int(paired and not pass_.residual)
    variant.parts.append(
        Part(at, splits, sums, segment.vector_len, segment.skip, pass_.plane, int(pass_.residual), added_to)
    )
    jobs = [
        _job(pass_, slice_, begin, end, place, column_list, at + (slice_ * len(ranges) + i) * sums)
        for slice_ in range(pass_.slices)
        for i, (begin, end) in enumerate(ranges)
    ]
    return [_unit(pass_, job, variant.max_tokens) for job in jobs]


def _unit(pass_: Pass, job: Job, tokens: int) -> Unit:
    """Costs are in cycles, fitted to measurements on an H200; only their proportions matter."""
    columns = job.column_end - job.column_begin
    if pass_.kind == Kind.SLICED:
        per_phase = 3.2 if tokens <= 8 else 4.6
        cost = WARPS * (columns / pass_.slices / 8 * per_phase + 30)
        return Unit(job, pass_.rows, WARPS, cost, fill=4000, tile=1500 + columns * tokens / 32, held=job.book)
    per_phase = {1: 2.7, 2: 1.9, 3: 1.5, 8: 1.1}[pass_.copies] * (2 if pass_.kind == Kind.BYTE_PAIRS else 1)
    cost = columns / 4 * per_phase + 60 * tokens / 8
    return Unit(job, -(-pass_.rows // 2), 1, cost, fill=2000 + pass_.images_bytes / 64, tile=1500)


def _column_ranges(pass_: Pass, tokens: int, processors: int) -> list[tuple[int, int]]:
    columns = pass_.segment.num_columns
    if pass_.kind == Kind.SLICED:
        step = SPAN_COLUMNS if tokens <= 8 else TILE_COLUMNS
        return [(lo, min(columns, lo + step)) for lo in range(0, columns, step)]
    per_load = COLUMNS_PER_LOAD[pass_.kind]
    loads, most = -(-columns // per_load), WARPS * WARP_COLUMNS // per_load
    splits = -(-loads // most)
    while -(-pass_.rows // 2) * splits < processors // 2 and loads // splits >= 2 * WARPS:
        splits *= 2
    step = -(-loads // splits) * per_load
    return [(lo, min(columns, lo + step)) for lo in range(0, columns, step)]


def _job(pass_: Pass, slice_: int, begin: int, end: int, place: NormPlace, column_list: int, out: int) -> Job:
    segment = pass_.segment
    tiles = -(-segment.num_columns // TILE_COLUMNS)
    return Job(
        kind=pass_.kind,
        scale=place.column_scale,
        shift=place.column_shift,
        column_list=column_list,
        column_begin=begin,
        column_end=end,
        codes=pass_.codes,
        row_words=pass_.row_words,
        book=pass_.book + slice_ * SLICE_ROWS,
        book_rows=min(SLICE_ROWS, pass_.book_rows - slice_ * SLICE_ROWS),
        res_book=pass_.res_book,
        res_rows=pass_.res_rows,
        copies=pass_.copies,
        lists=pass_.lists + slice_ * pass_.rows * tiles,
        list_tiles=tiles,
        out=out,
        vector_len=segment.vector_len,
        plane=pass_.plane,
    )


def _decoding_jobs(pass_: Pass, place: NormPlace, column_list: int, processors: int) -> list[Job]:
    """Jobs of about equal size that look up all weights of a pass; thread blocks take one each.

    Jobs of the same rows follow each other, so that they run at the same time: what they store lies in between each
    other's, and the L2 cache joins it to whole lines.
    """
    rows = pass_.rows if pass_.kind == Kind.SLICED else -(-pass_.rows // 2)
    pieces = max(1, min(processors // pass_.slices, rows // 4))
    columns = pass_.segment.num_columns
    jobs = [_job(pass_, slice_, 0, columns, place, column_list, 0) for slice_ in range(pass_.slices)]
    bounds = [rows * piece // pieces for piece in range(pieces + 1)]
    return [replace(job, row_begin=lo, row_end=hi) for lo, hi in pairwise(bounds) if hi > lo for job in jobs]


def _round8(n: int) -> int:
    return -(-n // 8) * 8
