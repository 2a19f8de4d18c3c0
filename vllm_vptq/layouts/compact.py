"""The compact layout: index bits as dense as on disk, each book once, everything of a layer in a few flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vptq.layouts.plan import (
    ABSENT,
    NORM_COLUMNS,
    NORM_NONE,
    NORM_ROWS,
    ModulePlan,
    SegmentPlan,
    encode,
)
from vllm_vptq.parameters import ModuleShard, Segment

_ALIGN_BYTES = 16
"""Streams and books start on 16 bytes, so that a kernel may load them in 16-byte accesses."""


@dataclass(frozen=True)
class CompactLayout:
    """The tensors of one layer on one rank, as ``ops.linear`` takes them.

    ``qweight`` int32: index streams, row after row. ``codebooks``: activation dtype. ``norm`` float32: scale and shift
    of each module. ``columns`` int32: column lists of segments that do not cover the input. ``dense``: activation
    dtype, weights of modules that are not quantized. ``plan``: see ``layouts.plan``.
    """

    qweight: Tensor
    codebooks: Tensor
    norm: Tensor | None
    columns: Tensor | None
    dense: Tensor | None
    plan: list[int]

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, in the order ``ops.linear`` takes them."""
        return {name: getattr(self, name) for name in ("qweight", "codebooks", "norm", "columns", "dense")}


class _Flat:
    """Collects tensors for one flat tensor; the same storage twice is kept once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.align = max(1, _ALIGN_BYTES // dtype.itemsize)
        self.parts: list[Tensor] = []
        self.size = 0
        self._seen: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def add(self, tensor: Tensor) -> int:
        """Appends a tensor and returns its offset in elements."""
        key = (tensor.data_ptr(), tensor.numel())
        if key not in self._seen:
            pad = -self.size % self.align
            if pad:
                self.parts.append(torch.zeros(pad, dtype=self.dtype, device=tensor.device))
            self.parts.append(tensor.to(self.dtype).flatten())
            # The tensor is kept with its place, so that its address stays its own.
            self._seen[key] = (self.size + pad, tensor)
            self.size += pad + tensor.numel()
        return self._seen[key][0]

    def tensor(self, device: torch.device) -> Tensor:
        return torch.cat(self.parts) if self.parts else torch.empty(0, dtype=self.dtype, device=device)

    def optional(self) -> Tensor | None:
        return torch.cat(self.parts) if self.parts else None


def build(shards: Sequence[ModuleShard], dtype: torch.dtype, device: torch.device) -> CompactLayout:
    """Lays out the shards of a layer, whose outputs follow each other in the given order.

    ``dtype`` is that of the activations; books in another dtype are cast to it.
    """
    words, books = _Flat(torch.int32), _Flat(dtype)
    norm, columns, dense = _Flat(torch.float32), _Flat(torch.int32), _Flat(dtype)
    modules, start = [], 0
    for shard in shards:
        kind, norm_offset = NORM_NONE, ABSENT
        if shard.scale is not None and shard.shift is not None:
            kind = NORM_COLUMNS if shard.norm_dim == 0 else NORM_ROWS
            norm_offset = norm.add(torch.cat([shard.scale.float(), shard.shift.float()]))
        modules.append(
            ModulePlan(
                out_start=start,
                out_features=shard.out_features,
                norm_kind=kind,
                norm_offset=norm_offset,
                dense_offset=ABSENT if shard.dense is None else dense.add(shard.dense),
                segments=tuple(_place(segment, words.add, books.add, columns.add) for segment in shard.segments),
            )
        )
        start += shard.out_features
    return CompactLayout(
        qweight=words.tensor(device),
        codebooks=books.tensor(device),
        norm=norm.optional(),
        columns=columns.optional(),
        dense=dense.optional(),
        plan=encode(modules),
    )


def _place(
    segment: Segment, words: Callable[[Tensor], int], books: Callable[[Tensor], int], columns: Callable[[Tensor], int]
) -> SegmentPlan:
    return SegmentPlan(
        vector_len=segment.vector_len,
        index_bits=segment.index_bits,
        res_bits=segment.res_bits,
        vector_rows=segment.words.shape[0],
        skip=segment.skip,
        num_columns=segment.num_columns,
        column_offset=ABSENT if segment.columns is None else columns(segment.columns),
        word_offset=words(segment.words),
        row_words=segment.words.shape[1],
        book_offset=books(segment.book),
        res_book_offset=ABSENT if segment.res_book is None else books(segment.res_book),
    )
