"""The compact layout: index bits as dense as on disk, each book once, everything of a layer in a few flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vptq.layouts.flat import Flat
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


def build(shards: Sequence[ModuleShard], dtype: torch.dtype, device: torch.device) -> CompactLayout:
    """Lays out the shards of a layer, whose outputs follow each other in the given order.

    ``dtype`` is that of the activations; books in another dtype are cast to it.
    """
    words, books = Flat(torch.int32), Flat(dtype)
    norm, columns, dense = Flat(torch.float32), Flat(torch.int32), Flat(dtype)
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
    if words.parts:
        # Kernels read an index that may straddle two words as two words, the last one of all too.
        words.add(torch.zeros(1, dtype=torch.int32, device=device))
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
