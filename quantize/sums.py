"""Sums of rows that share an index, the same bits every time: what is to a lookup as a transpose is to a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize import native

_PIECE = 64
"""Rows that one thread of a GPU adds up."""


class IndexedSums:
    """Sums over the rows of every value of an index, int32 or int64 ``[n]``, with values below ``count``.

    On a CPU rows are added one after another. A GPU's ``index_add_`` would add them atomically, in any order: there
    they are sorted once, and added up in pieces, then pieces likewise, until there is one sum for every value.
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
        self._bounds: list[Tensor] = []
        """Of what each sum of a pass is taken, int32 ``[sums + 1]``."""
        most = int(sizes.max())
        while most > _PIECE:
            pieces = -(-sizes // _PIECE)
            owner = torch.repeat_interleave(every, pieces)
            rank = torch.arange(len(owner), device=owner.device) - (pieces.cumsum(0) - pieces)[owner]
            self._bounds.append(_ends((sizes[owner] - rank * _PIECE).clamp_max(_PIECE)))
            sizes, most = pieces, -(-most // _PIECE)
        self._bounds.append(_ends(sizes))

    def __call__(self, rows: Tensor) -> Tensor:
        """Sums ``[count, w]`` of float32 rows ``[n, w]``."""
        if self._index.device.type == "cpu":
            return rows.new_zeros(self._count, rows.shape[1]).index_add_(0, self._index, rows)
        return self._by_pieces(rows)

    def _by_pieces(self, rows: Tensor) -> Tensor:
        if native.decodes(rows.device):
            rows = native.sum_pieces(rows, self._order, self._bounds[0])
            for bounds in self._bounds[1:]:
                rows = native.sum_pieces(rows, None, bounds)
            return rows
        rows = rows.index_select(0, self._order)
        for bounds in self._bounds:
            rows = torch.segment_reduce(rows, "sum", lengths=bounds.diff().long(), axis=0, unsafe=True)
        return rows


def _ends(lengths: Tensor) -> Tensor:
    """Where pieces that follow one another begin, and the last one's end: int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
