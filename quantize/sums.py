"""Sums of rows that share an index, the same bits every time: what is to a lookup as a transpose is to a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 64
"""Rows that one thread of a GPU adds up."""


class IndexedSums:
    """Sums over the rows of every value of an index, int32 or int64 ``[n]``, with values below ``count``.

    On a CPU rows are added one after another. A GPU's ``index_add_`` would add them atomically, in any order: there
    they are sorted once, and added up in pieces, then pieces.
    """

    def __init__(self, index: Tensor, count: int) -> None:
        self._index, self._count = index, count
        if index.device.type != "cpu":
            self._sort()

    def _sort(self) -> None:
        # Radix sort takes a pass for every byte of a key.
        index = self._index.short() if self._count <= torch.iinfo(torch.int16).max else self._index
        in_order, order = index.sort(stable=True)
        self._order = order.int()
        every = torch.arange(self._count, device=index.device)
        starts = torch.searchsorted(in_order.int(), every.int())
        sizes = torch.cat([starts, starts.new_full((1,), len(index))]).diff()
        self._pieces = -(-sizes // _PIECE)
        owner = torch.repeat_interleave(every, self._pieces)
        rank = torch.arange(len(owner), device=owner.device) - (self._pieces.cumsum(0) - self._pieces)[owner]
        self._lengths = (sizes[owner] - rank * _PIECE).clamp_max(_PIECE)

    def __call__(self, rows: Tensor) -> Tensor:
        """Sums ``[count, w]`` of float32 rows ``[n, w]``."""
        if self._index.device.type == "cpu":
            return rows.new_zeros(self._count, rows.shape[1]).index_add_(0, self._index, rows)
        return self._by_pieces(rows)

    def _by_pieces(self, rows: Tensor) -> Tensor:
        parts = torch.segment_reduce(
            rows.index_select(0, self._order), "sum", lengths=self._lengths, axis=0, unsafe=True
        )
        return torch.segment_reduce(parts, "sum", lengths=self._pieces, axis=0, unsafe=True)
