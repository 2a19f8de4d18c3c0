"""How a checkpoint module becomes this rank's shard. No kernels, no vLLM.

The decision here: every kernel sees the same thing, a list of *segments*. A segment is one pair of books, the
columns it serves in natural order, and a bit stream of indices over them. Groups, outlier columns, permutations,
fused modules and tensor parallel shards all dissolve into segments at load time, so that nothing behind this file
knows of them:

* the permutation is absorbed by sorting each block's columns; where a block then covers all columns of the rank
  (one group, no outliers: nearly every public checkpoint) no column list is left over;
* a column-parallel shard takes the vector rows that touch its output rows, and skips the first ``skip`` of them;
* a row-parallel shard takes the columns of its range from every block, and repacks their bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_vptq.format import (
    ColumnBlock,
    LayerSpec,
    VPTQFormatError,
    column_blocks,
    pack_indices,
    tensor_shapes,
    validate,
)
from vllm_vptq.sharding import Range

__all__ = ["Intake", "ModuleShard", "Segment", "Source", "cut_module"]

_REPACK_INDICES = 1 << 22
"""Indices unpacked at a time while repacking: bounds the extra memory of loading to about 200 MB."""


@dataclass(frozen=True)
class Segment:
    """Columns coded by one pair of books, for the output rows of one shard.

    ``words`` int32 ``[R, ceil(C * (index_bits + res_bits) / 32)]``: for each of R vector rows a bit stream of C merged
    indices, main index in the low bits, columns ascending. Output row n of the shard is element
    ``(n + skip) % vector_len`` of vector row ``(n + skip) // vector_len``. ``columns`` int32 ``[C]`` within the rank's
    input, or None when the segment covers all of it. ``book`` ``[k, v]``, ``res_book`` ``[r, v]`` or None.
    """

    vector_len: int
    index_bits: int
    res_bits: int
    num_columns: int
    skip: int
    words: Tensor
    columns: Tensor | None
    book: Tensor
    res_book: Tensor | None


@dataclass(frozen=True)
class ModuleShard:
    """The rows of one checkpoint module that one rank computes, over the columns the rank holds.

    ``scale`` and ``shift`` belong to columns (``norm_dim`` 0) or rows (1) of the shard, or are None. A module that is
    not quantized has ``dense`` ``[out_features, in_features]`` and no segments.
    """

    out_features: int
    in_features: int
    segments: tuple[Segment, ...] = ()
    scale: Tensor | None = None
    shift: Tensor | None = None
    norm_dim: int = 0
    dense: Tensor | None = None


def cut_module(
    tensors: Mapping[str, Tensor], spec: LayerSpec, rows: Range, columns: Range, device: torch.device | None = None
) -> ModuleShard:
    """Cuts output rows ``[lo, hi)`` and input columns ``[lo, hi)`` out of a validated module, onto ``device``.

    Books are shared, not copied, between cuts of the same tensors that already lie on ``device``.
    """
    segments = tuple(
        segment
        for block in column_blocks(tensors, spec)
        if (segment := _cut_block(block, rows, columns, device)) is not None
    )
    scale = shift = None
    if spec.enable_norm:
        keep = slice(*(columns if spec.norm_dim == 0 else rows))
        scale = tensors["weight_scale"][keep].to(device)
        shift = tensors["weight_bias"][keep].to(device)
    return ModuleShard(rows[1] - rows[0], columns[1] - columns[0], segments, scale, shift, spec.norm_dim)


def _cut_block(block: ColumnBlock, rows: Range, columns: Range, device: torch.device | None) -> Segment | None:
    v, bits = block.book.shape[1], block.index_bits + block.res_bits
    first, last = rows[0] // v, math.ceil(rows[1] / v)
    natural = block.columns.to(device)
    ascending = natural.argsort()
    kept = natural[ascending]
    inside = (kept >= columns[0]) & (kept < columns[1])
    position, kept = ascending[inside], kept[inside] - columns[0]
    if not kept.numel():
        return None
    start = int(position[0])
    in_order = torch.equal(position, torch.arange(start, start + position.numel(), device=position.device))
    aligned = start * bits % 32 == 0 and (
        (start + position.numel()) * bits % 32 == 0 or start + position.numel() == block.columns.numel()
    )
    if block.packed and in_order and aligned:
        # The stream on disk is already this segment's: whole words of it.
        begin = start * bits // 32
        width = math.ceil(position.numel() * bits / 32)
        # A copy even on the same device: a view would keep the whole stream alive.
        words = block.stored[first:last, begin : begin + width].to(device, copy=True)
    else:
        words = _repack(block, first, last, position, device)
    whole = kept.numel() == columns[1] - columns[0]
    return Segment(
        vector_len=v,
        index_bits=block.index_bits,
        res_bits=block.res_bits,
        num_columns=kept.numel(),
        skip=rows[0] - first * v,
        words=words,
        columns=None if whole else kept.to(torch.int32),
        book=block.book.to(device),
        res_book=None if block.res_book is None else block.res_book.to(device),
    )


def _repack(block: ColumnBlock, first: int, last: int, position: Tensor, device: torch.device | None) -> Tensor:
    step = max(1, _REPACK_INDICES // block.columns.numel())
    parts = []
    for lo in range(first, last, step):
        index, residual = block.read(lo, min(lo + step, last), device)
        index = index[:, position]
        if residual is not None:
            index |= residual[:, position] << block.index_bits
        parts.append(pack_indices(index, block.index_bits + block.res_bits))
    return torch.cat(parts)


@dataclass
class Source:
    """One checkpoint module that feeds a layer: ``pieces`` are the row ranges of it that this rank computes.

    ``shape`` is its whole ``(out_features, in_features)``. ``spec`` is None for a module that is not quantized.
    ``shard_ids`` are the names vLLM's loaders may give it.
    """

    name: str
    spec: LayerSpec | None
    pieces: list[Range]
    columns: Range
    shape: tuple[int, int]
    shard_ids: tuple[Any, ...] = ()
    shards: list[ModuleShard] = field(default_factory=list)
    staged: dict[str, Tensor] = field(default_factory=dict)

    @property
    def expected(self) -> set[str]:
        """Names of the tensors it needs."""
        return {"weight"} if self.spec is None else set(tensor_shapes(self.spec))

    def take(self, tensor: str, value: Tensor, device: torch.device) -> None:
        """Keeps a checkpoint tensor; cuts the rank's shards as soon as the last one is there."""
        if tensor not in self.expected:
            allowed = ", ".join(sorted(self.expected))
            raise VPTQFormatError(self.name, f"unknown tensor {tensor}; its configuration expects {allowed}")
        self.shards = []  # a tensor after the last one begins a new load, which must be as complete
        self.staged[tensor] = value
        if self.staged.keys() == self.expected:
            self.shards = self._cut(device)
            self.staged = {}

    def _cut(self, device: torch.device) -> list[ModuleShard]:
        if self.spec is None:
            return [self._cut_dense(rows, device) for rows in self.pieces]
        validate(self.name, self.staged, self.spec)
        # Books first and once, so that the pieces of a module share them.
        books = {n: t.to(device) for n, t in self.staged.items() if n.endswith("centroids.weight")}
        return [cut_module({**self.staged, **books}, self.spec, rows, self.columns, device) for rows in self.pieces]

    def _cut_dense(self, rows: Range, device: torch.device) -> ModuleShard:
        weight = self.staged["weight"]
        if tuple(weight.shape) != self.shape:
            raise VPTQFormatError(
                self.name, f"tensor weight has shape {list(weight.shape)}, expected {list(self.shape)}"
            )
        dense = weight[slice(*rows), slice(*self.columns)].to(device, copy=True)
        return ModuleShard(dense.shape[0], dense.shape[1], dense=dense)


class Intake:
    """Receives the checkpoint tensors of one (possibly fused) layer, in any order, and holds the rank's shards.

    A module is cut and its whole tensors are dropped as soon as its last tensor arrived, so that loading never
    holds more than one module beyond what the rank keeps.
    """

    def __init__(self, sources: list[Source], device: torch.device, on_ready: Callable[[], None]) -> None:
        self.sources = sources
        self.device = device
        self._on_ready = on_ready

    def tensor_names(self) -> set[str]:
        """Every tensor any of the sources needs."""
        return set().union(*(source.expected for source in self.sources))

    def load(self, tensor: str, value: Tensor, shard_id: Any = None) -> None:
        """Takes one checkpoint tensor; ``shard_id`` as vLLM's loaders name the parts of a fused layer."""
        self._source(shard_id).take(tensor, value, self.device)
        if self.ready:
            self._on_ready()

    @property
    def ready(self) -> bool:
        """Whether every source has been cut."""
        return all(source.shards for source in self.sources)

    @property
    def untouched(self) -> bool:
        """Whether nothing has come since the shards were last handed over."""
        return not any(source.shards or source.staged for source in self.sources)

    def require_ready(self) -> None:
        """VPTQFormatError naming the first module and tensor that never came."""
        for source in self.sources:
            if not source.shards:
                missing = min(source.expected - source.staged.keys())
                raise VPTQFormatError(source.name, f"tensor {missing} is missing from the checkpoint")

    def require_whole(self) -> None:
        """After loading again: VPTQFormatError as in require_ready if only a part of the tensors came."""
        if not self.untouched:
            self.require_ready()

    def loaded(self) -> list[ModuleShard]:
        """The shards, in output order, if every source has been cut; else none."""
        return [shard for source in self.sources for shard in source.shards] if self.ready else []

    def release(self) -> list[ModuleShard]:
        """Hands the shards over, in output order, and forgets them."""
        shards = self.loaded()
        for source in self.sources:
            source.shards, source.staged = [], {}
        return shards

    def _source(self, shard_id: Any) -> Source:
        if shard_id is None and len(self.sources) == 1:
            return self.sources[0]
        for source in self.sources:
            if shard_id in source.shard_ids:
                return source
        names = ", ".join(source.name for source in self.sources)
        raise VPTQFormatError(
            names, f"the model asks for part {shard_id!r}, the configuration has one for each of these"
        )
