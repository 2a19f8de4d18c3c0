"""Whether two engines compute the same model: logprobs within bounds, greedy tokens up to the first near-tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Answer = dict[str, Any]
"""One sequence: ``tokens``, their ``logprobs``, those of each ``runner_up``, and ``prompt_logprobs``, forced."""


@dataclass(frozen=True)
class Bound:
    """How far logprobs (natural logarithms) may lie apart. ``near_tie``: two tokens so close may change places."""

    mean: float
    worst: float
    near_tie: float


@dataclass(frozen=True)
class Agreement:
    """What a comparison found."""

    mean: float
    worst: float
    logprobs: int
    tokens: int
    parted: int

    def __str__(self) -> str:
        parted = f", {self.parted} parted at a near-tie" if self.parted else ""
        return f"|Δ| mean {self.mean:.4f} worst {self.worst:.3f} of {self.logprobs}; {self.tokens} tokens{parted}"


class DisagreementError(AssertionError):
    """Two engines that do not compute the same, in one line."""


def compare(found: Sequence[Answer], wanted: Sequence[Answer], bound: Bound) -> Agreement:
    """Holds answers against those to the same prompts; DisagreementError beyond ``bound``.

    Forced tokens (prompts) are compared at every position. Generated ones are compared until the engines choose
    differently, which they may where both see the two best within ``near_tie``: from there on they answer other texts.
    """
    if len(found) != len(wanted) or not found:
        raise DisagreementError(f"{len(found)} answers, expected {len(wanted)}")
    gaps: list[float] = []
    tokens = parted = 0
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        forced, reference = a.get("prompt_logprobs") or [], b.get("prompt_logprobs") or []
        if len(forced) != len(reference):
            raise DisagreementError(f"sequence {i}: {len(forced)} prompt logprobs, expected {len(reference)}")
        gaps += [abs(x - y) for x, y in zip(forced, reference, strict=True)]
        if len(a["tokens"]) != len(b["tokens"]):
            raise DisagreementError(f"sequence {i}: {len(a['tokens'])} tokens, expected {len(b['tokens'])}")
        same = _same_tokens(i, a, b, bound)
        gaps += [abs(x - y) for x, y in zip(a["logprobs"][:same], b["logprobs"][:same], strict=True)]
        tokens += same
        parted += same < len(b["tokens"])
    if not gaps:
        raise DisagreementError("no logprobs to compare")
    result = Agreement(fmean(gaps), max(gaps), len(gaps), tokens, parted)
    # Written so that a NaN fails.
    if not all(gap <= bound.worst for gap in gaps) or not result.mean <= bound.mean:
        raise DisagreementError(f"{result}; bounds are mean {bound.mean} worst {bound.worst}")
    if 2 * parted > len(found):
        raise DisagreementError(f"{result}: most sequences parted")
    return result


def _same_tokens(i: int, a: Answer, b: Answer, bound: Bound) -> int:
    """How many tokens are the same; DisagreementError if the first other one was no near-tie."""
    for at, (mine, theirs) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
        if mine != theirs:
            margin = max(answer["logprobs"][at] - answer["runner_up"][at] for answer in (a, b))
            if not margin <= bound.near_tie:
                raise DisagreementError(
                    f"sequence {i}, token {at}: {mine}, expected {theirs}, {margin:.3f} ahead of the next"
                )
            return at
    return len(b["tokens"])


def identical(found: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    """The same to the last bit; DisagreementError at the first that is not."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a != b:
            parts = [key for key in b if a.get(key) != b[key]]
            raise DisagreementError(f"sequence {i} differs in {', '.join(parts)}")
