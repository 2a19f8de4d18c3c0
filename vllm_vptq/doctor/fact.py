"""What doctor finds out: a named value, a judgement, and what to do about a bad one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """``fine`` is None where a value is neither good nor bad; ``remedy`` belongs to one that is bad."""

    name: str
    value: str
    fine: bool | None = None
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a device serves a model with native kernels, and if not, what is missing and how to get it."""

    device: str
    serves: bool
    text: str
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All facts, and a verdict for every device."""

    facts: tuple[Fact, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def serves(self) -> bool:
        """Whether something here can serve with native kernels."""
        return any(verdict.serves for verdict in self.verdicts)
