"""The stationary layout: books lie still in shared memory, indices are sorted and packed for them at load.

Every segment becomes one or more *passes*, each over one book and eight elements of its vectors (a *plane*), because
16 bytes are what shared memory hands out at once. Kinds of passes, by the size of the book (docs/kernels.md):

* up to 256 entries: codes of one byte, eight images of the book, look-ups without bank conflicts. A residual book as
  small rides along;
* up to 8192: codes of two bytes, that name one of up to three images of an entry;
* above, for few tokens: the book is cut into slices of 8192 entries, and the indices of a vector row are sorted into a
  list for each; for more tokens: codes of two bytes, and the book stays in memory.

The aligned layout is the same without lists: codes of whole bytes, for any number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vllm_vptq.build.toolkit import HOPPER
from vllm_vptq.layouts import wide, work
from vllm_vptq.layouts.flat import Flat
from vllm_vptq.layouts.passes import (
    COLUMNS_PER_LOAD,
    SLICE_ROWS,
    TILE_COLUMNS,
    NormPlace,
    Packed,
    Pass,
    pack,
    store_norm,
)
from vllm_vptq.layouts.work import ABSENT, Decoding, Job, Kind, LayerWork, LookupLayout, Module, Part, Unit, Variant
from vllm_vptq.parameters import ModuleShard

SPAN_COLUMNS = 2 * TILE_COLUMNS
WARPS = 16
WARP_COLUMNS = 256
"""Columns of a resident pass whose activations a warp holds."""
TOKENS = (8, 16, 32, 64)
"""Most tokens of a call, one entry per variant."""


@dataclass(frozen=True)
class Gpu:
    """What a layout is made for."""

    processors: int
    tensor_groups: bool
    """Whether it has the tensor-core instruction of a whole warp group, ``wgmma``: Hopper alone does."""

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, (properties.major, properties.minor) == HOPPER)


def build(
    shards: Sequence[ModuleShard],
    dtype: torch.dtype,
    device: torch.device,
    gpu: Gpu,
    direct_tokens: int,
    lists: bool = True,
) -> LookupLayout:
    """Packs the shards of a layer, whose outputs follow each other.

    ``books`` are rows of 8 elements, in as many planes as a vector needs. Without ``lists`` it is the aligned layout,
    which takes a GPU with ``tensor_groups``.
    Calls of up to ``direct_tokens`` look weights up; larger ones decode them and leave the product to cuBLAS.
    """
    if not (lists or gpu.tensor_groups):
        raise ValueError("the aligned layout takes a GPU with tensor groups")
    codes, books = Flat(torch.int32), Flat(dtype)
    norm, columns, dense = Flat(torch.float32), Flat(torch.int32), Flat(dtype)
    decodings: list[Decoding] = []
    dense_modules: list[tuple[int, int, int]] = []
    parts: list[_ModuleParts] = []
    start = 0
    for shard in shards:
        if shard.dense is not None:
            dense_modules.append((start, shard.out_features, dense.add(shard.dense)))
        segments = []
        place = store_norm(shard, norm)
        for segment in shard.segments:
            column_list = ABSENT if segment.columns is None else columns.add(segment.columns)
            packed = pack(segment, codes, books, lists)
            segments.append((packed, column_list))
            for main, residual in packed.decoded:
                part = Part(0, 0, 0, segment.vector_len, segment.skip, main.plane)
                jobs = [None if p is None else p.job(place, column_list) for p in (main, residual)]
                assert jobs[0] is not None
                decodings.append(Decoding(len(parts), jobs[0], jobs[1], part))
        parts.append(_ModuleParts(shard, start, place, segments))
        start += shard.out_features
    packed_segments = [packed for module in parts for packed, _ in module.segments]
    few = few_tokens(packed_segments, gpu)
    variants = [_few(tokens, parts, gpu.processors) for tokens in TOKENS if tokens <= few]
    used = [pass_ for packed in packed_segments for pass_ in packed.few if few]
    if gpu.tensor_groups and packed_segments:
        variants += [_wide(tokens, parts, gpu.processors) for tokens in TOKENS if tokens > few]
        used += [pass_ for packed in packed_segments for pass_ in packed.wide]
    layer = LayerWork(
        stationary=True,
        out_features=start,
        in_features=shards[0].in_features,
        shared_bytes=max([1024, *(pass_.shared_bytes for pass_ in used)]),
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


def few_tokens(segments: Sequence[Packed], gpu: Gpu) -> int:
    """The most tokens of a call that csrc/cuda/multiply.cu serves better than wide.cuh, as measured on an H200.

    Lists beat gathering from memory, where a book is too large, until their activations, looked up as well, cost more;
    and sooner where what takes several look-ups of lists takes fewer gathered ones.
    """
    if not gpu.tensor_groups or not segments:
        return 16
    if all(pass_.kind != Kind.SLICED for packed in segments for pass_ in packed.few):
        return 0
    return 16 if all(len(packed.few) == len(packed.wide) for packed in segments) else 8


def crossover_class(shards: Sequence[ModuleShard]) -> str:
    """Which entry of crossovers.json applies to a layer with or without lists: that of its largest book."""
    segments = [segment for shard in shards for segment in shard.segments]
    return class_of(1 << max((max(s.index_bits, s.res_bits) for s in segments), default=0))


def class_of(entries: int) -> str:
    """The class of a layer whose largest book has ``entries`` entries."""
    return "far" if entries > SLICE_ROWS else "resident"


@dataclass(frozen=True)
class _ModuleParts:
    """A module: its outputs begin at ``start``; its segments, packed, with the places of their column lists."""

    shard: ModuleShard
    start: int
    place: NormPlace
    segments: list[tuple[Packed, int]]

    def record(self, variant: Variant, first_part: int, part_count: int) -> tuple[Module, list[Unit]]:
        """The record in a variant, and the unit that computes the norm's dot products, if there is a norm."""
        shard, place = self.shard, self.place
        end = self.start + shard.out_features
        module = Module(self.start, end, first_part, first_part + part_count, dense=int(shard.dense is not None))
        if place.scale == ABSENT:
            return module, []
        module.dot = variant.reserve(1)
        if place.rows:
            module.scale, module.shift = place.scale, place.shift
        job = Job(Kind.DOT, column_end=shard.in_features, out=module.dot, shift=place.column_shift)
        tokens = 1 if variant.max_tokens <= 8 else 4
        return module, [Unit(job, variant.max_tokens, tokens, 500 + tokens * shard.in_features / 16, tile=1500)]


def _few(tokens: int, modules: Sequence[_ModuleParts], processors: int) -> Variant:
    """The variant of calls of up to ``tokens``, 8 or 16, by csrc/cuda/multiply.cu."""
    made = Variant(tokens)
    units: list[Unit] = []
    for module in modules:
        first = len(made.parts)
        for packed, column_list in module.segments:
            for pass_ in packed.few:
                units += _units(pass_, made, module.place, column_list, processors)
        record, dot = module.record(made, first, len(made.parts) - first)
        made.modules.append(record)
        units += dot
    made.jobs = work.cut(units, processors)
    return made


def _wide(tokens: int, modules: Sequence[_ModuleParts], processors: int) -> Variant:
    """The variant of calls of up to ``tokens`` by csrc/cuda/wide.cuh."""
    dots, records, passes, first = Variant(tokens), [], [], 0
    units: list[Unit] = []
    for module in modules:
        own = [(p, p.job(module.place, at)) for packed, at in module.segments for p in packed.wide]
        record, dot = module.record(dots, first, len(own))
        first += len(own)
        records.append(record)
        passes.append(own)
        units += dot
    made = wide.variant(tokens, passes, units, processors, dots.stride)
    made.modules = records
    return made


def _units(pass_: Pass, variant: Variant, place: NormPlace, column_list: int, processors: int) -> list[Unit]:
    """Cuts a pass by columns and slices, reserves its sums, and adds its part to the variant."""
    segment = pass_.segment
    ranges = _column_ranges(pass_, variant.max_tokens, processors)
    splits, sums = len(ranges) * pass_.slices, pass_.rows * 8 + 8  # pairs of rows: one more
    at = variant.reserve(splits * sums)
    variant.parts.append(Part(at, splits, sums, segment.vector_len, segment.skip, pass_.plane))
    whole = pass_.job(place, column_list)
    jobs = [
        replace(
            whole,
            column_begin=begin,
            column_end=end,
            book=pass_.book + slice_ * SLICE_ROWS,
            book_rows=min(whole.book_rows, pass_.book_rows - slice_ * SLICE_ROWS),
            lists=pass_.lists + slice_ * pass_.rows * pass_.list_tiles,
            out=at + (slice_ * len(ranges) + i) * sums,
        )
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
    return Unit(job, pass_.tiles, 1, cost, fill=2000 + pass_.images_bytes / 64, tile=1500)


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
