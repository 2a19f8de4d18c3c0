"""How near a call comes to what a GPU can do at most: shares of its memory's and its shared memory's bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

ROW_BYTES = 16
"""Of shared memory, that one look-up takes: up to eight elements of a vector."""


@dataclass(frozen=True)
class Work:
    """The least a call has to do in any layout.

    ``nbytes``: indices as they are on disk, books, activations and outputs, each once. ``look_ups``: rows of
    ROW_BYTES out of the books, each weight's once for all tokens.
    """

    nbytes: float
    look_ups: float

    @classmethod
    def of(cls, v: int, k: int, r: int, outs: list[int], inputs: int, tokens: int) -> Work:
        """Of a fused layer of modules with ``outs`` outputs, in 16-bit numbers."""
        books = [n for n in (k, r) if n]
        vectors = sum(-(-out // v) for out in outs) * inputs
        indices = vectors * sum(math.log2(n) for n in books) / 8
        numbers = len(outs) * sum(books) * v + tokens * (inputs + sum(outs))
        return cls(indices + 2 * numbers, vectors * len(books) * -(-v // 8))


@dataclass(frozen=True)
class Limits:
    """What a GPU does at most in a microsecond: bytes of its memory, rows of shared memory without bank conflicts."""

    nbytes: float
    look_ups: float

    @classmethod
    def of(cls, properties: Any) -> Limits:
        """Of ``torch.cuda.get_device_properties``, at the highest clocks (kHz there)."""
        # Memory moves data twice a clock; a multiprocessor hands out 128 bytes of shared memory in one.
        memory = properties.memory_clock_rate / 1e3 * 2 * properties.memory_bus_width / 8
        return cls(memory, properties.clock_rate / 1e3 * properties.multi_processor_count * 128 / ROW_BYTES)

    def percent(self, work: Work, us: float) -> dict[str, float]:
        """Columns of the table: how much of each bandwidth the least work would take in this time."""
        return {
            "memory_percent": round(100 * work.nbytes / us / self.nbytes, 1),
            "gather_percent": round(100 * work.look_ups / us / self.look_ups, 1),
        }
