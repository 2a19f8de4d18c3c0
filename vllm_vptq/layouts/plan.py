"""The plan of a layer: where in its flat tensors each piece lies, as a list of integers an op can take.

A plan is constant for a layer, so it travels as an ``int[]`` argument: visible to torch.compile, equal for equal
layers, and free of pointers. Offsets count elements of the tensor they point into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import lru_cache

NORM_NONE, NORM_COLUMNS, NORM_ROWS = 0, 1, 2
ABSENT = -1


@dataclass(frozen=True)
class SegmentPlan:
    """See ``parameters.Segment``. ``column_offset`` and ``res_book_offset`` may be ABSENT."""

    vector_len: int
    index_bits: int
    res_bits: int
    vector_rows: int
    skip: int
    num_columns: int
    column_offset: int
    word_offset: int
    row_words: int
    book_offset: int
    res_book_offset: int


@dataclass(frozen=True)
class ModulePlan:
    """One module's rows of the output, ``[out_start, out_start + out_features)``.

    ``norm_kind`` NORM_COLUMNS or NORM_ROWS: scale, then shift, at ``norm_offset``. ``dense_offset`` is ABSENT for a
    quantized module.
    """

    out_start: int
    out_features: int
    norm_kind: int
    norm_offset: int
    dense_offset: int
    segments: tuple[SegmentPlan, ...]


def encode(modules: Iterable[ModulePlan]) -> list[int]:
    """Flattens a plan. The inverse of :func:`decode`."""
    out: list[int] = []
    for module in modules:
        *head, segments = (getattr(module, f.name) for f in fields(ModulePlan))
        out += [*head, len(segments)]
        for segment in segments:
            out += astuple(segment)
    return out


def decode(plan: Iterable[int]) -> tuple[ModulePlan, ...]:
    """Reads a plan back; cached, since an op decodes its layer's plan at every call."""
    return _decode(tuple(plan))


@lru_cache(maxsize=4096)
def _decode(plan: tuple[int, ...]) -> tuple[ModulePlan, ...]:
    numbers = iter(plan)
    return tuple(_modules(numbers))


def _modules(numbers: Iterator[int]) -> Iterator[ModulePlan]:
    width = len(fields(SegmentPlan))
    for out_start in numbers:
        out_features, norm_kind, norm_offset, dense_offset, count = (next(numbers) for _ in range(5))
        segments = tuple(SegmentPlan(*(next(numbers) for _ in range(width))) for _ in range(count))
        yield ModulePlan(out_start, out_features, norm_kind, norm_offset, dense_offset, segments)
