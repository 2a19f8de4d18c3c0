"""Books and norms changed so that 16-bit numbers lose little between them. The weight stays what it is.

*Centred*: the reference's norm maps a column's least weight to 0 and its greatest to 1, so entries lie around 1/2,
several times as far from zero as from each other, and most of a product with them is what the shift takes away again.
Every rounding of an activation that was scaled, of the sum of two entries, or of a book to the activations' dtype then
weighs as much more: outputs of such a layer in 16 bits had 1.7 times the error of a dense product with one book, 3
times with two. With entries ``c - m`` and shift ``b + m * scale`` they have 1.1 and 1.4 times.

*Scaled*: where entries lie around 1 the norm's scale is that of the weights, and float16 has few bits for activations
times that: below 6e-5 they are subnormal. A power of two moves from the books to the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_vptq.parameters import ModuleShard

SCALE = 1 / 8
"""About what the median scale of float16 is raised to: a column with more than eight times that can still multiply the
largest activations, and many times that all but those."""
MOST_FACTOR = 64
"""Leaves entries around 1 far from being subnormal themselves."""


def condition(shards: Sequence[ModuleShard], dtype: torch.dtype) -> list[ModuleShard]:
    """Shards of the same weights, whose books are new ones in ``dtype`` where there was something to change.

    Books that shards shared are shared still.
    """
    made: dict[tuple[int, int, float, float], Tensor] = {}

    def moved(book: Tensor, middle: float, factor: float) -> Tensor:
        key = (book.data_ptr(), book.numel(), middle, factor)
        if key not in made:
            made[key] = ((book.float() - middle) / factor).to(dtype)
        return made[key]

    conditioned = []
    for shard in shards:
        if shard.scale is not None and shard.shift is not None:
            middle, factor = _middle(shard), _factor(shard, dtype)
            if (middle, factor) != (0, 1):
                segments = tuple(
                    replace(
                        s,
                        book=moved(s.book, middle, factor),
                        res_book=None if s.res_book is None else moved(s.res_book, 0, factor),
                    )
                    for s in shard.segments
                )
                scale = shard.scale.float()
                shift = shard.shift.float() + middle * scale
                shard = replace(shard, segments=segments, scale=scale * factor, shift=shift)
        conditioned.append(shard)
    return conditioned


def _middle(shard: ModuleShard) -> float:
    """The mean of a shard's entries, both books' together, to a multiple of about their spread: 0 if it is near.

    A power of two times a small number, so that few entries are rounded when it is subtracted.
    """
    means, squares, columns = 0.0, 0.0, 0
    for s in shard.segments:
        books = [s.book] if s.res_book is None else [s.book, s.res_book]
        variances, own = zip(*(torch.var_mean(book.float(), correction=0) for book in books), strict=True)
        variance, whole = torch.stack([sum(variances), sum(own)]).tolist()
        means += s.num_columns * whole
        squares += s.num_columns * (variance + whole**2)
        columns += s.num_columns
    mean = means / columns
    spread = math.sqrt(max(squares / columns - mean**2, 0.0))
    if spread == 0:
        return 0.0
    grid = 2.0 ** round(math.log2(spread))
    return round(mean / grid) * grid


def _factor(shard: ModuleShard, dtype: torch.dtype) -> float:
    """The power of two for the scale, 1 where it is large enough or no activation is multiplied by it."""
    assert shard.scale is not None
    if dtype != torch.float16 or shard.norm_dim != 0:
        return 1.0
    median = shard.scale.float().abs().median().item()
    return min(max(2.0 ** math.floor(math.log2(SCALE / max(median, 1e-30))), 1.0), MOST_FACTOR)
