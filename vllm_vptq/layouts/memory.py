"""What a layer takes in each layout, known before it is packed, and which layouts a model's layers get for it.

``auto`` asks for the fastest layouts that leave room for the KV cache. Steps from a layout to the next faster one are
taken while there is memory for them, those first that cost least per weight, and of larger layers first, since small
ones gain least.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vllm_vptq.format import LayerSpec
from vllm_vptq.layouts.flat import alike
from vllm_vptq.layouts.passes import COLUMNS_PER_LOAD, SLICE_ROWS, TILE_COLUMNS, books_of, code_kinds, slice_bits_of
from vllm_vptq.layouts.work import Kind
from vllm_vptq.parameters import ModuleShard, Segment

COMPACT, ALIGNED, STATIONARY = LAYOUTS = ("compact", "aligned", "stationary")
"""From the smallest and slowest to the largest and fastest."""
ROOM = 0.4
"""Share of the memory vLLM may use that ``auto`` leaves for KV cache and activations."""
_LIST_PADDING = 15.5
"""Entries that a list of random length is short of whole groups of 32, on average."""


@dataclass(frozen=True)
class Layer:
    """A layer's number of weights, and the bytes of its indices and books in every layout it may have."""

    weights: int
    nbytes: dict[str, int]


def measure(shards: Sequence[ModuleShard], layouts: Sequence[str]) -> Layer:
    """Exact but for the padding of lists, which depends on the indices, and for the records of jobs.

    Norms, column lists and dense modules are left out: they are the same in every layout. So is the aligned layout
    where it is the stationary one, because no book needs lists.
    """
    segments = [segment for shard in shards for segment in shard.segments]
    weights = sum(shard.out_features * shard.in_features for shard in shards)
    sizes = {layout: _codes(segments, layout) + _books(segments, layout) for layout in layouts}
    if ALIGNED in sizes and not any(_large(book) for segment in segments for book, _ in books_of(segment)):
        del sizes[ALIGNED]
    return Layer(weights, sizes)


def module_of(spec: LayerSpec) -> ModuleShard:
    """A whole module of a spec, for ``measure``: its indices take no memory here."""
    outputs, columns = spec.shape

    def segment(v: int, entries: int, residual: int, count: int) -> Segment:
        # A book of outliers may have any number of entries.
        bits, res_bits = max(1, (entries - 1).bit_length()), max(residual, 1).bit_length() - 1
        words = torch.empty(-(-outputs // v), -(-count * (bits + res_bits) // 32), dtype=torch.int32, device="meta")
        book = torch.empty(entries, v, dtype=torch.float16)  # books are told apart by where they lie
        res_book = torch.empty(residual, v, dtype=torch.float16) if residual else None
        return Segment(v, bits, res_bits, count, 0, words, None, book, res_book)

    segments = []
    if spec.outlier_size:
        segments.append(segment(spec.outlier_vector_len, spec.num_outlier_centroids, 0, spec.outlier_size))
    for first in range(spec.outlier_size, columns, spec.group_size):
        count = min(spec.group_size, columns - first)
        segments.append(segment(spec.vector_len, spec.num_centroids, spec.num_res_centroids, count))
    return ModuleShard(outputs, columns, tuple(segments))


def norm_bytes(spec: LayerSpec) -> int:
    """Of a module's scale and shift, which every layout holds in float32."""
    return 2 * 4 * spec.shape[1 - spec.norm_dim] if spec.enable_norm else 0


def resident_bytes(specs: Iterable[LayerSpec]) -> dict[str, int]:
    """Bytes that a GPU holds of whole modules in each layout: indices, books, norms and column lists.

    Layouts that come to the same as a smaller one are there, too. Layers that are fused share some padding.
    """
    totals = dict.fromkeys(LAYOUTS, 0)
    for spec, count in Counter(specs).items():
        module = module_of(spec)
        sizes = measure([module], LAYOUTS).nbytes
        columns = 4 * module.in_features if len(module.segments) > 1 else 0
        for layout in LAYOUTS:
            totals[layout] += count * (sizes.get(layout, sizes[STATIONARY]) + norm_bytes(spec) + columns)
    return totals


def distribute(layers: Sequence[Layer], budget: float) -> list[str]:
    """The layout of each layer, such that together they take at most ``budget`` bytes more than the smallest ones."""
    steps = []
    for i, layer in enumerate(layers):
        names = [layout for layout in LAYOUTS if layout in layer.nbytes]
        for place, (small, fast) in enumerate(itertools.pairwise(names)):
            more = layer.nbytes[fast] - layer.nbytes[small]
            steps.append((place, more / max(layer.weights, 1), -layer.weights, i, more, small, fast))
    chosen = [next(layout for layout in LAYOUTS if layout in layer.nbytes) for layer in layers]
    # A step of a layer comes after the one before it.
    for _, _, _, i, more, small, fast in sorted(steps):
        if chosen[i] == small and more <= max(budget, 0):
            chosen[i] = fast
            budget -= more
    return chosen


def _large(entries: int) -> bool:
    return entries > SLICE_ROWS


def _codes(segments: Sequence[Segment], layout: str) -> int:
    if layout == COMPACT:
        return sum(segment.words.numel() * 4 for segment in segments)
    codes = sum(_aligned_codes(segment) for segment in segments)
    lists = sum(_lists(segment) for segment in segments) if layout == STATIONARY else 0
    return alike((codes + lists) // 4) * 4 if lists else codes


def _aligned_codes(segment: Segment) -> int:
    """Bytes of codes, for 16 outputs and whole loads: a byte or two for each book, two for a pair of small ones."""
    kinds, rows, total = code_kinds(segment), segment.words.shape[0], 0
    # Where both planes of vectors are gathered at once, each row has codes of its own; else two of them share loads.
    apart = segment.vector_len > 8 and all(kind == Kind.FAR for kind in kinds)
    for kind in kinds:
        loads = -(-segment.num_columns // COLUMNS_PER_LOAD[kind])
        total += loads * (rows * 256 if apart else -(-rows // 2) * 512)
    return total


def _lists(segment: Segment) -> int:
    """Bytes of the entries of large books, of 32 bits, and of the offsets of their lists."""
    total, rows = 0.0, segment.words.shape[0]
    for entries, _ in books_of(segment):
        if _large(entries):
            lists = rows * -(-entries >> slice_bits_of(segment.vector_len)) * -(-segment.num_columns // TILE_COLUMNS)
            total += 4 * (rows * segment.num_columns + lists * _LIST_PADDING + lists)
    return int(total)


def _books(segments: Sequence[Segment], layout: str) -> int:
    """Bytes of books. Pieces of a module share what need not be rearranged."""
    total, seen = 0, set()
    for segment in segments:
        length = segment.vector_len
        for book in (segment.book, segment.res_book):
            if book is None:
                continue
            as_they_are = layout == COMPACT or length == 8
            if as_they_are and (key := (book.data_ptr(), book.numel())) in seen:
                continue
            if as_they_are:
                seen.add(key)
            # Where gathered and sliced vectors are laid out differently, both are kept.
            twice = layout == STATIONARY and length != 8 and _large(book.shape[0])
            total += book.shape[0] * (length if layout == COMPACT else -(-length // 8) * 8) * 2 * (1 + twice)
    return total
