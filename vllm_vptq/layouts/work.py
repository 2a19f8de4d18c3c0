"""What the CUDA kernels are told about a layer: records that mirror csrc/cuda/kernels.h, and the plan of the op.

A layer's work is cut into *jobs*, a thread block's pieces, listed in one int32 tensor on the device (``work``). The
plan, numbers that the op finds by a name (``gpu.name_of``), says where in it things lie and holds what the host itself
must know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

ABSENT = -1


class Kind(IntEnum):
    """How a job finds its weights; see csrc/cuda/kernels.h."""

    COMPACT, SLICED, BYTES, BYTE_PAIRS, SHORTS, DOT, FAR, FAR_BYTES = range(8)


@dataclass
class Record:
    """Some int32 that a kernel reads as a struct."""

    def numbers(self) -> list[int]:
        """The fields in their order."""
        return list(vars(self).values())  # astuple copies deeply: most of the time that a layer's plan took


@dataclass
class Job(Record):
    """A thread block's piece of work: the fields of ``vptq::Job``, in its order."""

    kind: int
    scale: int = ABSENT
    column_list: int = ABSENT
    column_begin: int = 0
    column_end: int = 0
    row_begin: int = 0
    row_end: int = 0
    codes: int = 0
    row_words: int = 0
    book: int = 0
    book_rows: int = 0
    res_book: int = ABSENT
    res_rows: int = 0
    copies: int = 1
    lists: int = 0
    list_tiles: int = 0
    out: int = 0
    vector_len: int = 0
    plane: int = 0
    index_bits: int = 0
    res_bits: int = 0
    shift: int = ABSENT
    width: int = 8
    source: int = ABSENT
    dot: int = ABSENT


@dataclass
class Part(Record):
    """Sums that belong to the same outputs: ``vptq::Part``."""

    out: int
    splits: int
    stride: int
    vector_len: int
    skip: int
    plane: int
    width: int = 8
    counts: int = ABSENT


@dataclass
class Module(Record):
    """One module's outputs: ``vptq::Module``."""

    out_begin: int
    out_end: int
    part_begin: int
    part_end: int
    dot: int = ABSENT
    dots: int = 0
    scale: int = ABSENT
    shift: int = ABSENT
    dense: int = 0


PREPARE_COLUMNS = 4096
"""Of a thread block of csrc/cuda/prepare.cu."""


@dataclass
class Preparation(Record):
    """What is done once to activations that many thread blocks want: ``vptq::Preparation``, of all columns at first."""

    scale: int
    column_list: int
    column_begin: int
    column_end: int
    at: int = ABSENT
    shift: int = ABSENT
    dot: int = ABSENT

    @property
    def chunks(self) -> int:
        """Thread blocks a token, each of which leaves a part of the dot product."""
        return -(-self.column_end // PREPARE_COLUMNS)

    def cut(self) -> list[Preparation]:
        """Those of each thread block."""
        return [
            replace(
                self,
                column_begin=begin,
                column_end=min(self.column_end, begin + PREPARE_COLUMNS),
                at=ABSENT if self.at == ABSENT else self.at + begin,
                dot=ABSENT if self.dot == ABSENT else self.dot + i,
            )
            for i, begin in enumerate(range(0, self.column_end, PREPARE_COLUMNS))
        ]


@dataclass
class Launch:
    """What one kernel works off: the jobs of each of its thread blocks.

    ``wide``: that kernel is csrc/cuda/wide.cuh, all look-ups being of this kind (DOT: of several); or ABSENT.
    """

    jobs: list[list[Job]] = field(default_factory=list)
    wide: int = ABSENT


@dataclass
class Variant:
    """How calls of up to ``max_tokens`` are worked off: by which launches, one after another, and where sums go.

    ``counts``: lists that parts name by their place here, until they are stored. ``preparations`` fill rows of
    ``prepared_columns`` activations, which jobs take theirs from.
    """

    max_tokens: int
    launches: list[Launch] = field(default_factory=list)
    modules: list[Module] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    preparations: list[Preparation] = field(default_factory=list)
    prepared_columns: int = 0
    stride: int = 0

    def reserve(self, floats: int) -> int:
        """Room for sums in a token's row of the workspace, in floats; pairs of sums are stored at once."""
        begin = self.stride
        self.stride += (floats + 3) // 4 * 4
        return begin


@dataclass(frozen=True)
class Decoding:
    """How weights of a module are looked up, all of them that ``job`` reaches; those of ``residual`` are added."""

    module: int
    job: Job
    residual: Job | None
    part: Part

    def numbers(self) -> list[int]:
        residual = self.residual or Job(ABSENT)
        return [self.module, *self.job.numbers(), *residual.numbers(), *self.part.numbers()]


@dataclass(frozen=True)
class LookupLayout:
    """The tensors of one layer on one rank, as ``gpu.lookup_linear`` takes them, and its plan.

    ``codes`` int32: indices, packed or in lists. ``books``: activation dtype. ``norm`` float32, ``columns`` int32,
    ``dense`` activation dtype: as in the compact layout. ``work`` int32: records.
    """

    codes: Tensor
    books: Tensor
    norm: Tensor | None
    columns: Tensor | None
    dense: Tensor | None
    work: Tensor
    plan: list[int]

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, in the order ``gpu.lookup_linear`` takes them."""
        return {name: getattr(self, name) for name in ("codes", "books", "norm", "columns", "dense", "work")}


@dataclass
class LayerWork:
    """Everything the kernels are told about a layer.

    ``decodings`` reach every weight once, for products with many tokens. ``dense``: (first output, rows, offset) of
    dense modules.
    """

    stationary: bool
    out_features: int
    in_features: int
    shared_bytes: int
    direct_tokens: int
    variants: list[Variant]
    decodings: list[Decoding]
    dense: list[tuple[int, int, int]]

    def encode(self, device: torch.device) -> tuple[Tensor, list[int]]:
        """The tensor ``work`` and the plan; RuntimeError if offsets do not fit the 32 bits that kernels have."""
        words: list[int] = []

        def store(records: Sequence[Record]) -> int:
            at = len(words)
            for record in records:
                words.extend(record.numbers())
            return at

        plan = [int(self.stationary), self.out_features, self.in_features, self.shared_bytes, self.direct_tokens]
        plan += [len(self.variants), len(self.variants[0].modules)]
        for v in self.variants:
            parts = [part if part.counts == ABSENT else self._with_counts(part, v, words) for part in v.parts]
            prepared = [piece for whole in v.preparations for piece in whole.cut()]
            plan += [v.max_tokens, v.stride, store(v.modules), store(parts)]
            plan += [store(prepared), len(prepared), v.prepared_columns, len(v.launches)]
            for launch in v.launches:
                jobs = store([job for thread_block in launch.jobs for job in thread_block])
                starts = len(words)
                words.append(0)
                for thread_block in launch.jobs:
                    words.append(words[-1] + len(thread_block))
                plan += [launch.wide, jobs, starts, len(launch.jobs)]
            plan += [len(parts), *(n for record in (*v.modules, *parts) for n in record.numbers())]
        decodings = [n for decoding in self.decodings for n in decoding.numbers()]
        if max(max(words, default=0), max(decodings, default=0)) >= 1 << 31:
            raise RuntimeError(
                f"a layer of {self.out_features} x {self.in_features} has more codes in this layout than kernels can "
                "address; set VLLM_VPTQ_LAYOUT=compact, or split it among more GPUs (--tensor-parallel-size)"
            )
        plan += [len(self.decodings), *decodings]
        plan += [len(self.dense), *(n for entry in self.dense for n in entry)]
        return torch.tensor(words, dtype=torch.int32).to(device), plan

    @staticmethod
    def _with_counts(part: Part, variant: Variant, words: list[int]) -> Part:
        at = len(words)
        words.extend(variant.counts[part.counts])
        return replace(part, counts=at)


def out_features(plan: Sequence[int]) -> int:
    """Outputs of the layer a plan is of."""
    return plan[1]


def in_features(plan: Sequence[int]) -> int:
    """Inputs of the layer a plan is of."""
    return plan[2]


def direct_tokens(plan: Sequence[int]) -> int:
    """The most tokens of a call that looks weights up rather than decoding them."""
    return plan[4]


@dataclass
class Unit:
    """Work that can be cut by rows: ``job`` with its rows still open.

    ``fill`` cycles to set up, unless the thread block just did a unit with the same ``held``; ``tile`` cycles in any
    case. ``grain`` rows are done at once, at ``cost`` cycles.
    """

    job: Job
    rows: int
    grain: int
    cost: float
    fill: float = 0.0
    tile: float = 0.0
    held: int | None = None


def cut(units: Sequence[Unit], thread_blocks: int) -> list[list[Job]]:
    """The jobs of ``divide``."""
    return [
        [replace(units[u].job, row_begin=begin, row_end=end) for u, begin, end in pieces]
        for pieces in divide(units, thread_blocks)
    ]


Pieces = list[tuple[int, int, int]]
"""A thread block's share: the place of a unit, its first row and the one behind its last."""


def divide(units: Sequence[Unit], thread_blocks: int) -> list[Pieces]:
    """Divides units, in order, among at most ``thread_blocks`` so that the slowest is as quick as can be.

    More are used only when there is no other way. The order is kept, so that neighbours share what they hold.
    """
    return _divide(tuple((u.rows, u.grain, u.cost, u.fill, u.tile, u.held) for u in units), thread_blocks)


Costs = tuple[tuple[int, int, float, float, float, int | None], ...]
"""Rows, grain, cost, fill, tile and held of each unit."""


@lru_cache(maxsize=512)  # the layers of a model are alike
def _divide(units: Costs, thread_blocks: int) -> list[Pieces]:
    # A little more than everything, lest rounding leave a row over.
    low, high = 0.0, 1.001 * sum(fill + tile + cost * -(-rows // grain) for rows, grain, cost, fill, tile, _ in units)
    for _ in range(24):
        middle = (low + high) / 2
        if len(_fill_blocks(units, middle)) <= thread_blocks:
            high = middle
        else:
            low = middle
    return _fill_blocks(units, high)


def _fill_blocks(units: Costs, budget: float) -> list[Pieces]:
    """Thread blocks as lists of (unit, first row, last row), each within the budget if one grain is."""
    done: list[Pieces] = []
    block: Pieces = []
    left, held = budget, None
    for u, (rows, grain, cost, fill, tile, holds) in enumerate(units):
        row = 0
        while row < rows:
            setup = tile + (0 if block and holds is not None and holds == held else fill)
            grains = int((left - setup) / cost)
            if grains < 1 and block:
                done.append(block)
                block, left, held = [], budget, None
                continue
            grains = max(1, min(grains, -(-(rows - row) // grain)))
            end = min(rows, row + grains * grain)
            block.append((u, row, end))
            left -= setup + grains * cost
            row, held = end, holds
    if block:
        done.append(block)
    return done
