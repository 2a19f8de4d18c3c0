"""The stationary layout for few tokens with the compact one beside it for many.

Decoding weights out of lists that are sorted by codebook slice, or of vectors that do not fill 16 bytes, scatters
small stores over the whole matrix: three to thirty times slower than decoding the bit streams (docs/kernels.md). So
where a layer has such parts its bit streams are kept too, 2 to 4 bits a weight more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vptq.layouts import compact, stationary, streams
from vllm_vptq.parameters import ModuleShard


@dataclass(frozen=True)
class PairedLayout:
    """The tensors of one layer on one rank, as ``gpu.lookup_by_count`` takes them.

    ``codes``, ``books``, ``work`` and ``plan`` are those of ``layouts.stationary``; with ``stream_`` in front, those of
    ``layouts.streams``. Both read the same ``norm``, ``columns`` and ``dense``.
    """

    codes: Tensor
    books: Tensor
    work: Tensor
    stream_codes: Tensor
    stream_books: Tensor
    stream_work: Tensor
    norm: Tensor | None
    columns: Tensor | None
    dense: Tensor | None
    plan: list[int]
    stream_plan: list[int]

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name."""
        own = ("codes", "books", "work", "stream_codes", "stream_books", "stream_work", "norm", "columns", "dense")
        return {name: getattr(self, name) for name in own}


def build(
    shards: Sequence[ModuleShard], dtype: torch.dtype, device: torch.device, processors: int, direct_tokens: int
) -> PairedLayout:
    """Lays shards out in both ways; calls of up to ``direct_tokens`` use the stationary one."""
    few = stationary.build(shards, dtype, device, processors, direct_tokens)
    many = streams.build(compact.build(shards, dtype, device), shards[0].in_features, processors, direct_tokens=0)
    return PairedLayout(
        codes=few.codes,
        books=few.books,
        work=few.work,
        stream_codes=many.codes,
        stream_books=many.books,
        stream_work=many.work,
        norm=few.norm,
        columns=few.columns,
        dense=few.dense,
        plan=few.plan,
        stream_plan=many.plan,
    )
