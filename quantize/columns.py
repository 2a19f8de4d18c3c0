"""Choosing indices: the column walk with error feedback, and coordinate descent over indices chosen already.

Weights lie transposed here, ``[columns, rows]`` in the order in which columns are coded. Rows are independent of each
other given the books, so all of them advance together, column by column, in blocks whose effect on the other columns is
carried over by one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize import native
from quantize.hessian import inverse_factor
from quantize.kmeans import Books, assign
from quantize.slab import Slab

_BLOCK = 128
"""Columns coded before their effect is carried to the rest in one product."""

Codes = tuple[Tensor, Tensor | None]
"""Main and residual indices int64 ``[columns, R]`` of one segment; R vectors of v rows each."""


BlockStep = Callable[[Tensor, Tensor, Books, int, Tensor, Tensor | None], Tensor]
"""See :func:`code_block_torch` and :func:`sweep_block_torch`."""


@dataclass(frozen=True)
class Segment:
    """Columns from ``start`` to ``end``, in coding order, that share books."""

    start: int
    end: int
    books: Books

    @property
    def v(self) -> int:
        """The vector length."""
        return self.books.main.shape[1]


def as_vectors(columns: Tensor, v: int) -> Tensor:
    """Vectors ``[C, R, v]`` of columns ``[C, rows]``; rows that do not fill the last one are padded with zeros."""
    rows = columns.shape[1]
    return torch.nn.functional.pad(columns, (0, -rows % v)).view(len(columns), -1, v)


def decode(rows: int, segments: list[Segment], codes: list[Codes]) -> Tensor:
    """The coded columns ``[C, rows]`` of all segments."""
    return torch.cat(
        [s.books.decode(*code).flatten(1)[:, :rows] for s, code in zip(segments, codes, strict=True)],
    )


def loss(slab: Slab, segments: list[Segment], codes: list[Codes]) -> float:
    """The slab's loss with these codes."""
    return slab.loss(slab.target - decode(slab.target.shape[1], segments, codes))


def walk(slab: Slab, segments: list[Segment], candidates: int, factor: Tensor | None = None) -> list[Codes]:
    """Codes column after column; the error of each is spread over those not yet coded.

    GPTQ (https://arxiv.org/abs/2210.17323) with vectors of output rows: VPTQ's channel-independent second order.
    ``factor`` is the moment's inverse factor, where it is known.
    """
    if factor is None:
        factor = inverse_factor(slab.moment)
    left = slab.target.clone()
    rows = left.shape[1]
    code_block = _code_block_native if native.available(left.device) else code_block_torch
    codes = [_empty(segment, rows, left.device) for segment in segments]
    _in_blocks(code_block, left, factor, segments, codes, candidates)
    return codes


def sweep(slab: Slab, segments: list[Segment], codes: list[Codes], candidates: int) -> list[Codes]:
    """One pass of coordinate descent over all columns: each takes its best choice given all the others.

    With the others fixed, the loss in column j is ``H_jj |q_j - aim_j|^2``, ``aim_j = q_j + (H E)_j / H_jj``, so that
    the nearest choice to the aim is the best (CDQuant, https://arxiv.org/abs/2406.17542, for vectors). The loss never
    rises.
    """
    rows = slab.target.shape[1]
    coded = decode(rows, segments, codes)
    pull = slab.moment / slab.moment.diagonal()  # pull[j, i]: how far a move of column j shifts the aim of column i
    aim = torch.addmm(coded, pull.T, slab.target - coded)
    sweep_block = _sweep_block_native if native.available(aim.device) else sweep_block_torch
    swept = [(index.clone(), None if residual is None else residual.clone()) for index, residual in codes]
    _in_blocks(sweep_block, aim, pull, segments, swept, candidates)
    return swept


def _in_blocks(
    step: BlockStep, columns: Tensor, matrix: Tensor, segments: list[Segment], codes: list[Codes], candidates: int
) -> None:
    """Takes a step block after block, writing ``codes``; carries what it returns on to the ``columns`` behind."""
    rows = columns.shape[1]
    for segment, (index, residual) in zip(segments, codes, strict=True):
        for start in range(segment.start, segment.end, _BLOCK):
            end = min(start + _BLOCK, segment.end)
            here = slice(start - segment.start, end - segment.start)
            parts = index[here], None if residual is None else residual[here]
            block = as_vectors(columns[start:end], segment.v).contiguous()
            moved = step(block, matrix[start:end, start:end], segment.books, candidates, *parts)
            columns[end:].addmm_(matrix[start:end, end:].T, moved.flatten(1)[:, :rows], alpha=-1)


def _empty(segment: Segment, rows: int, device: torch.device) -> Codes:
    shape = (segment.end - segment.start, -(-rows // segment.v))
    index = torch.empty(shape, dtype=torch.int64, device=device)
    return index, None if segment.books.residual is None else torch.empty_like(index)


def code_block_torch(
    block: Tensor, factor: Tensor, books: Books, candidates: int, index: Tensor, residual: Tensor | None
) -> Tensor:
    """Codes a block ``[columns, R, v]`` in place of ``index`` and ``residual`` ``[columns, R]``.

    ``factor`` is the block of the inverse factor. Returns the errors ``[columns, R, v]`` over their diagonal element.
    """
    block = block.clone()
    errors = torch.empty_like(block)
    for j in range(len(block)):
        main, second = assign(block[j], books, candidates)
        index[j] = main
        if residual is not None and second is not None:
            residual[j] = second
        errors[j] = (block[j] - books.decode(main, second)) / factor[j, j]
        block[j + 1 :] -= factor[j, j + 1 :, None, None] * errors[j]
    return errors


def sweep_block_torch(
    aim: Tensor, pull: Tensor, books: Books, candidates: int, index: Tensor, residual: Tensor | None
) -> Tensor:
    """Moves a block's columns ``[columns, R, v]`` to what is nearest to their aims; updates ``index`` and ``residual``.

    Returns how far each moved, ``[columns, R, v]``.
    """
    aim = aim.clone()
    moves = torch.zeros_like(aim)
    for j in range(len(aim)):
        old = index[j], None if residual is None else residual[j]
        new = assign(aim[j], books, candidates)
        before, after = books.decode(*old), books.decode(*new)
        moved = (aim[j] - after).square().sum(1) < (aim[j] - before).square().sum(1)
        index[j] = torch.where(moved, new[0], index[j])
        if residual is not None and new[1] is not None:
            residual[j] = torch.where(moved, new[1], residual[j])
        moves[j] = (after - before) * moved[:, None]
        aim[j + 1 :] -= pull[j, j + 1 :, None, None] * moves[j]
    return moves


def _code_block_native(
    block: Tensor, factor: Tensor, books: Books, candidates: int, index: Tensor, residual: Tensor | None
) -> Tensor:
    return native.code_block(block, factor, books.main, books.residual, candidates, (index, residual))


def _sweep_block_native(
    aim: Tensor, pull: Tensor, books: Books, candidates: int, index: Tensor, residual: Tensor | None
) -> Tensor:
    return native.sweep_block(aim, pull, books.main, books.residual, candidates, (index, residual))
