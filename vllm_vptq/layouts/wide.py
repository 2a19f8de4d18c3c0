"""Jobs of csrc/cuda/wide.cuh: products of 8 to 128 tokens, for which three or four warp groups of a block look up.

A block computes 192 or 256 outputs at once and walks along the columns. Columns are divided so that all blocks of the
GPU get as much to do: a block ends in the middle of some outputs, and the next goes on there. So the sums of some
outputs come in more pieces than others', and ``Part.counts`` says in how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_vptq.layouts import work
from vllm_vptq.layouts.passes import LARGE_RING_BYTES, RING_BYTES, Pass
from vllm_vptq.layouts.work import ABSENT, Job, Kind, Launch, Part, Unit, Variant

COUNTED_SUMS = 64
"""That the numbers of ``Part.counts`` are for."""
GRANULE_COLUMNS = 256
"""Columns that a job is cut at, and multiplied together: zeros stand behind the last."""


def ring_bytes(tokens: int, kind: int) -> int:
    """Of the ring of activations, which lies in front of the books, by the kernel for ``tokens`` and jobs of a kind."""
    large = tokens == 128 and kind not in (Kind.SHORTS, Kind.DOT)
    return LARGE_RING_BYTES if large else RING_BYTES


def tiles(tokens: int, kind: int) -> int:
    """Of 16 outputs, that a block computes at once: one a warp."""
    resident = kind in (Kind.BYTES, Kind.BYTE_PAIRS, Kind.SHORTS)
    return 16 if resident and tokens <= 32 else 12


@dataclass
class Strip:
    """The outputs a block computes at once: tiles of a pass from ``begin``; ``part`` is that of the pass."""

    pass_: Pass
    part: int
    begin: int


def cut(made: Variant, passes: Sequence[tuple[Pass, Job]], processors: int) -> None:
    """Adds a launch to a variant, and the parts of its passes, in their order; given with jobs over all of them."""
    tokens = made.max_tokens
    strips: list[Strip] = []
    units: list[Unit] = []
    kinds = {pass_.kind for pass_, _ in passes}
    launch = Launch(wide=int(kinds.pop() if len(kinds) == 1 else Kind.DOT))
    made.launches.append(launch)
    most = tiles(tokens, launch.wide)
    for part, (pass_, job) in enumerate(passes, len(made.parts)):
        for begin in range(0, pass_.tiles, most):
            strips.append(Strip(pass_, part, begin))
            units.append(_unit(pass_, job, tokens, most))
    pieces = work.divide(units, processors)
    splits = _place_sums(made, [pass_ for pass_, _ in passes], strips, pieces, most)
    seen = [0] * len(strips)
    for block in pieces:
        jobs = []
        for u, begin, end in block:
            strip, whole = strips[u], units[u].job
            part_ = made.parts[strip.part]
            jobs.append(
                replace(
                    whole,
                    row_begin=strip.begin,
                    row_end=min(strip.pass_.tiles, strip.begin + most),
                    column_begin=begin * GRANULE_COLUMNS,
                    column_end=min(whole.column_end, end * GRANULE_COLUMNS),
                    out=part_.out + seen[u] * part_.stride,
                )
            )
            seen[u] += 1
        launch.jobs.append(jobs)
    assert seen == splits


def _place_sums(
    made: Variant, passes: Sequence[Pass], strips: Sequence[Strip], pieces: Sequence[work.Pieces], most: int
) -> list[int]:
    """Adds the parts; how many pieces the sums of each strip come in."""
    splits = [0] * len(strips)
    for block in pieces:
        for u, _, _ in block:
            splits[u] += 1
    for part, pass_ in enumerate(passes, len(made.parts)):
        counts = [n for strip, n in zip(strips, splits, strict=True) if strip.part == part]
        stride = pass_.tiles * 16
        at = made.reserve(max(counts) * stride)
        uneven = ABSENT
        if min(counts) < max(counts):
            uneven = len(made.counts)
            made.counts.append([n for n in counts for _ in range(most * 16 // COUNTED_SUMS)])
        segment = pass_.segment
        made.parts.append(
            Part(at, max(counts), stride, segment.vector_len, segment.skip, pass_.plane, pass_.width, uneven)
        )
    return splits


def _unit(pass_: Pass, job: Job, tokens: int, tiles: int) -> Unit:
    """Costs are cycles of shared memory, or of the L2 cache; only their proportions matter."""
    images = {1: 10.7, 2: 7.2, 3: 5.3, 8: 4.0}
    far = pass_.kind in (Kind.FAR, Kind.FAR_BYTES)
    look_up = 44.0 if far else images[pass_.copies]
    books = 2 if pass_.kind == Kind.BYTE_PAIRS else 1
    # Activations are read by the tensor cores, which from 128 tokens on take longer than that.
    cost = tiles * GRANULE_COLUMNS / 16 * max(books * look_up + tokens / 16, tokens / 8)
    granules = -(-pass_.segment.num_columns // GRANULE_COLUMNS)
    fill = 0.0 if pass_.kind == Kind.FAR else 1500 + pass_.images_bytes / 64
    return Unit(job, granules, 1, cost, fill=fill, tile=600 + tokens * 6, held=job.book)
