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
from vllm_vptq.layouts.flat import LINE_BYTES, Flat, alike
from vllm_vptq.layouts.passes import (
    COLUMNS_PER_LOAD,
    SHARED_BYTES,
    SLICE_BITS,
    SLICE_ROWS,
    TILE_COLUMNS,
    NormPlace,
    Packed,
    Pass,
    image_bytes,
    pack,
    resident,
    store_norm,
)
from vllm_vptq.layouts.work import (
    ABSENT,
    Decoding,
    Job,
    Kind,
    Launch,
    LayerWork,
    LookupLayout,
    Module,
    Part,
    Preparation,
    Unit,
    Variant,
)
from vllm_vptq.parameters import ModuleShard

SPAN_COLUMNS = 2 * TILE_COLUMNS
WARPS = 16
WARP_COLUMNS = 256
"""Columns of a resident pass whose activations a warp holds."""
TOKENS = (8, 16, 32, 64, 128)
"""Most tokens of a call, one entry per variant."""
SCALED_TOKENS = 8
"""Up to so many, thread blocks with lists scale the activations they want; else a kernel does it first, for all. That
also gathers what a column list names, and pads what cannot be loaded 16 bytes at a time."""


@dataclass(frozen=True)
class Gpu:
    """What a layout is made for."""

    processors: int
    tensor_groups: bool
    """Whether it has the tensor-core instruction of a whole warp group, ``wgmma``: Hopper alone does."""
    shared_bytes: int = SHARED_BYTES
    """That a thread block can have."""

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        properties = torch.cuda.get_device_properties(device)
        return cls(
            properties.multi_processor_count,
            (properties.major, properties.minor) == HOPPER,
            properties.shared_memory_per_block_optin,
        )

    @property
    def most_entries(self) -> int:
        """Of a book of vectors of up to 8 elements that fits shared memory."""
        return min(SLICE_ROWS, 1 << (image_bytes(self.shared_bytes) // 16).bit_length() - 1)

    def serves(self, shards: Sequence[ModuleShard]) -> bool:
        """Whether the layout's kernels can serve a layer: with less shared memory, if its books fit there."""
        if self.shared_bytes >= SHARED_BYTES:
            return True
        return all(resident(segment, self.shared_bytes) for shard in shards for segment in shard.segments)


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
    if not gpu.serves(shards):
        raise ValueError("the books do not fit this GPU's shared memory")
    codes, books, listed = Flat(torch.int32), Flat(dtype), Flat(torch.int32, LINE_BYTES)
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
            packed = pack(segment, codes, listed if lists else None, books, gpu.shared_bytes)
            segments.append((packed, column_list))
            for main, residual in packed.decoded:
                part = Part(0, 0, 0, segment.vector_len, segment.skip, main.plane)
                jobs = [None if p is None else p.job(place, column_list) for p in (main, residual)]
                assert jobs[0] is not None
                decodings.append(Decoding(len(parts), jobs[0], jobs[1], part))
        parts.append(_ModuleParts(shard, start, place, segments))
        start += shard.out_features
    # Behind the codes, whose places then are those of every layer of such a shape, whatever its indices: so are plans.
    base = codes.append(listed)
    if listed.parts:
        codes.pad(alike(codes.size))
    parts = [
        replace(module, segments=[(packed.with_lists_at(base), at) for packed, at in module.segments])
        for module in parts
    ]
    packed_segments = [packed for module in parts for packed, _ in module.segments]
    few = few_tokens(packed_segments, gpu)
    variants = [_few(tokens, parts, gpu) for tokens in TOKENS if tokens <= few]
    shared = [1024, *(pass_.shared_bytes() for packed in packed_segments for pass_ in packed.few if few)]
    if gpu.tensor_groups and packed_segments:
        variants += [_wide(tokens, parts, gpu.processors) for tokens in TOKENS if tokens > few]
        ring = wide.ring_bytes(variants[-1].max_tokens, variants[-1].launches[0].wide)
        shared += [pass_.shared_bytes(ring) for packed in packed_segments for pass_ in packed.wide]
    layer = LayerWork(
        stationary=True,
        out_features=start,
        in_features=shards[0].in_features,
        shared_bytes=max(shared),
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
    return 16 if all(_listed(packed) <= _gathered(packed) for packed in segments) else 8


def _listed(packed: Packed) -> int:
    return sum(pass_.width // 8 for pass_ in packed.few if pass_.kind == Kind.SLICED)


def _gathered(packed: Packed) -> int:
    return sum(pass_.kind in (Kind.FAR, Kind.FAR_BYTES) for pass_ in packed.wide)


def crossover_class(shards: Sequence[ModuleShard]) -> str:
    """Which entry of crossovers.json applies to a layer with or without lists: that of its largest book."""
    segments = [segment for shard in shards for segment in shard.segments]
    found = [(max(s.index_bits, s.res_bits), s.vector_len, min(s.index_bits, s.res_bits)) for s in segments]
    larger, vector_len, smaller = max(found, default=(0, 8, 0))
    return class_of(vector_len, larger, smaller)


def class_of(vector_len: int, larger_bits: int, smaller_bits: int) -> str:
    """The class of a layer, by the bits of an index into its larger and its smaller book; 0 if that is none.

    ``bytes`` are those whose vectors fill their planes: with others they are no faster than ``shorts``. These and
    ``far`` take one look-up a vector; where it is several, of planes or of a residual book, it is ``and more``.
    """
    small = larger_bits <= 8
    if small and vector_len % 8 == 0:
        return "bytes"
    name = "far" if larger_bits > SLICE_BITS else "shorts"
    return name if vector_len <= 8 and (small or not smaller_bits) else f"{name} and more"


@dataclass(frozen=True)
class _ModuleParts:
    """A module: its outputs begin at ``start``; its segments, packed, with the places of their column lists."""

    shard: ModuleShard
    start: int
    place: NormPlace
    segments: list[tuple[Packed, int]]

    def record(self, first_part: int, part_count: int) -> Module:
        """The record in a variant, without its norm's dot product."""
        end = self.start + self.shard.out_features
        module = Module(self.start, end, first_part, first_part + part_count, dense=int(self.shard.dense is not None))
        if self.place.rows:
            module.scale, module.shift = self.place.scale, self.place.shift
        return module


def _few(tokens: int, modules: Sequence[_ModuleParts], gpu: Gpu) -> Variant:
    """The variant of calls of up to ``tokens``, 8 or 16, by csrc/cuda/multiply.cu.

    Books beside lists that fit shared memory are looked up in a launch of wide.cuh, where the GPU has it.
    """
    made = Variant(tokens)
    jobs = _jobs(made, modules, [[(p, at) for packed, at in m.segments for p in packed.few] for m in modules])
    flat = [both for own in jobs for both in own]
    listed = [pass_.kind == Kind.SLICED for pass_, _ in flat]
    if not (gpu.tensor_groups and any(listed)):
        listed = [True] * len(flat)
    units: list[Unit] = []
    for (pass_, job), here in zip(flat, listed, strict=True):
        if here:
            units += _units(pass_, job, made, gpu.processors)
    made.launches.append(Launch(work.cut(units, gpu.processors)))
    if not all(listed):
        apart = [both for both, here in zip(flat, listed, strict=True) if not here]
        wide.cut(made, apart, gpu.processors)
    # The parts of a module follow each other.
    made_as = sorted(range(len(flat)), key=lambda i: not listed[i])
    made.parts = [part for _, part in sorted(zip(made_as, made.parts, strict=True), key=lambda both: both[0])]
    return made


def _wide(tokens: int, modules: Sequence[_ModuleParts], processors: int) -> Variant:
    """The variant of calls of up to ``tokens`` by csrc/cuda/wide.cuh."""
    made = Variant(tokens)
    jobs = _jobs(made, modules, [[(p, at) for packed, at in m.segments for p in packed.wide] for m in modules])
    wide.cut(made, [both for own in jobs for both in own], processors)
    return made


def _jobs(
    made: Variant, modules: Sequence[_ModuleParts], passes: Sequence[Sequence[tuple[Pass, int]]]
) -> list[list[tuple[Pass, Job]]]:
    """Jobs over all of each module's passes, given with their column lists; adds records. A pass has one part.

    Activations and a norm's dot products are left to a kernel before, except where all is in lists.
    """
    found, first = [], 0
    for module, own in zip(modules, passes, strict=True):
        jobs = [(pass_, pass_.job(module.place, at)) for pass_, at in own]
        record = module.record(first, len(jobs))
        first += len(jobs)
        listed = all(pass_.kind == Kind.SLICED and _as_in_memory(pass_, job) for pass_, job in jobs)
        if made.max_tokens > SCALED_TOKENS or not listed:
            jobs = _prepare(made, record, module, jobs)
        elif module.place.scale != ABSENT:
            (pass_, job), *others = jobs
            record.dots = len(_column_ranges(pass_, made.max_tokens, 1))
            record.dot = made.reserve(record.dots)
            jobs = [(pass_, replace(job, dot=record.dot)), *others]
        made.modules.append(record)
        found.append(jobs)
    return found


def _as_in_memory(pass_: Pass, job: Job) -> bool:
    """Whether a pass takes its columns as they lie in the input, where it can load them 16 bytes at a time."""
    return job.column_list == ABSENT and pass_.segment.num_columns % 8 == 0


def _prepare(
    made: Variant, record: Module, module: _ModuleParts, jobs: Sequence[tuple[Pass, Job]]
) -> list[tuple[Pass, Job]]:
    """A module's jobs, which find their activations scaled and gathered; what does that is added to the variant."""
    places: dict[tuple[int, int], int] = {}

    def prepared(pass_: Pass, job: Job) -> Job:
        columns = pass_.segment.num_columns
        key = (job.scale, job.column_list)
        if job.scale == ABSENT and _as_in_memory(pass_, job):
            return job
        if key not in places:
            places[key] = made.prepared_columns
            made.preparations.append(Preparation(*key, 0, columns, at=places[key]))
            made.prepared_columns += -(-columns // wide.GRANULE_COLUMNS) * wide.GRANULE_COLUMNS
        return replace(job, scale=ABSENT, column_list=ABSENT, source=places[key])

    first = len(made.preparations)
    own = [(pass_, prepared(pass_, job)) for pass_, job in jobs]
    place, columns = module.place, module.shard.in_features
    if place.scale == ABSENT:
        return own
    whole = next((p for p in made.preparations[first:] if p.column_list == ABSENT), None)
    if whole is None:
        whole = Preparation(ABSENT, ABSENT, 0, columns)
        made.preparations.append(whole)
    assert whole.column_end == columns
    whole.shift = place.column_shift
    whole.dot = record.dot = made.reserve(whole.chunks)
    record.dots = whole.chunks
    return own


def _units(pass_: Pass, whole: Job, variant: Variant, processors: int) -> list[Unit]:
    """Cuts a pass by columns and slices, reserves its sums, and adds its part to the variant."""
    segment = pass_.segment
    ranges = _column_ranges(pass_, variant.max_tokens, processors)
    width = pass_.width
    splits, sums = len(ranges) * pass_.slices, pass_.rows * width + 8  # pairs of rows: one more
    at = variant.reserve(splits * sums)
    variant.parts.append(Part(at, splits, sums, segment.vector_len, segment.skip, pass_.plane, width))
    jobs = [
        replace(
            whole,
            column_begin=begin,
            column_end=end,
            book=pass_.book + slice_ * pass_.slice_rows,
            book_rows=min(whole.book_rows, pass_.book_rows - slice_ * pass_.slice_rows),
            res_book=whole.res_book if whole.res_book == ABSENT else whole.res_book + slice_ * pass_.slice_rows,
            lists=pass_.lists + slice_ * pass_.rows * pass_.list_tiles,
            out=at + (slice_ * len(ranges) + i) * sums,
            dot=ABSENT if whole.dot == ABSENT or slice_ else whole.dot + i,
        )
        for slice_ in range(pass_.slices)
        for i, (begin, end) in enumerate(ranges)
    ]
    return [_unit(pass_, job, variant.max_tokens) for job in jobs]


def _unit(pass_: Pass, job: Job, tokens: int) -> Unit:
    """Costs are in cycles, fitted to measurements on an H200; only their proportions matter."""
    columns = job.column_end - job.column_begin
    if pass_.kind == Kind.SLICED:
        per_phase = (3.2 if tokens <= 8 else 4.6) * (1.5 if pass_.width == 16 else 1)
        cost = WARPS * (columns / pass_.slices / 8 * per_phase + 30)
        tile = 1500 + columns * tokens / 32 + (0 if job.dot == ABSENT else 1000)
        return Unit(job, pass_.rows, WARPS, cost, fill=4000, tile=tile, held=job.book)
    per_phase = {1: 2.7, 2: 1.8, 3: 1.3, 8: 1.1}[pass_.copies] * (2 if pass_.kind == Kind.BYTE_PAIRS else 1)
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
