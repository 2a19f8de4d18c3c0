"""What a profiler's trace says of a decoding step: which kernels, how long each, one layer's in their order.

Kernels overlap, since programmatic dependent launch starts one while the one before drains. A kernel's own time is
therefore what it adds to the end of all that began before it, and idle is the time before it in which none of those
ran: own times and idle times add up to the time that passes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

KINDS = ("ours", "attention", "products", "Triton", "copies", "others")
"""Of kernels, in the order of the table."""
_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_WRAPPERS = ("device_kernel", "enable_sm90_or_later", "enable_sm80_to_sm89")
"""Templates that only run what their first argument names."""
_ATTENTION = re.compile(r"flash|attention|attn|fmha|reshape_and_cache|paged|mla_|decodewithkvcache", re.IGNORECASE)
_PRODUCT = re.compile(r"nvjet|gemm|gemv|cublas|splitkreduce|marlin|machete|cutlass", re.IGNORECASE)


class TraceError(ValueError):
    """A trace in which no steps are to be found, in one line."""


@dataclass(frozen=True)
class Kernel:
    """One launch, times in us. ``late``: begins after the end of all before it, negative if before that end."""

    name: str
    kind: str
    grid: str
    begin: float
    lasts: float
    late: float

    @property
    def own(self) -> float:
        """Time that no kernel begun earlier covers."""
        return max(0.0, self.lasts + min(0.0, self.late))

    @property
    def idle(self) -> float:
        """Time before it in which nothing ran."""
        return max(0.0, self.late)


def short(name: str) -> str:
    """``finish_kernel`` of ``void vptq::(anonymous namespace)::finish_kernel<__half, 1>(int)``."""
    words, open_ = "", ""
    for before, character in zip(" " + name, name, strict=False):
        if character in "(<[":
            open_ += character
        elif character in ")>]":
            if character == ">" and (before == "-" or open_.endswith(("(", "["))):
                continue  # an arrow, or greater than: types have no brackets of that kind in parentheses
            if not open_:
                break  # of the template whose argument this is
            open_ = open_[:-1]
        elif character == "," and not open_:
            break
        elif not open_:
            words += character
    if words.startswith(("Memcpy", "Memset")):
        return words.strip()
    # A function's return type comes before its name.
    last = words.split()[-1].rpartition("::")[2] if words.split() else name
    inner = name.partition(f"{last}<")[2]
    return short(inner) if last in _WRAPPERS and inner else last


def kind(name: str, category: str = "kernel") -> str:
    """Of ``KINDS``, of a kernel's full name."""
    if category != "kernel":
        return "copies"
    if re.match(r"(void )?vptq::", name):
        return "ours"
    if name.startswith("triton_"):
        return "Triton"
    if _ATTENTION.search(name):
        return "attention"
    return "products" if _PRODUCT.search(name) else "others"


def kernels(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """What ran on the GPU, by begin, of a Chrome trace's ``traceEvents``."""
    found: list[Kernel] = []
    end: float | None = None
    ran = (event for event in events if event.get("cat") in _CATEGORIES)
    for event in sorted(ran, key=lambda event: (event["ts"], event["dur"])):
        begin, lasts, name = float(event["ts"]), float(event["dur"]), event["name"]
        late = begin - (begin if end is None else end)
        grid = "x".join(map(str, event.get("args", {}).get("grid", ())))
        found.append(Kernel(short(name), kind(name, event["cat"]), grid, begin, lasts, late))
        end = max(begin + lasts, end or 0.0)
    return found


def steps(found: Sequence[Kernel], layers: int) -> list[list[Kernel]]:
    """The decoding steps of a model of ``layers`` layers; TraceError if the trace has none.

    A kernel that runs once a step cuts the trace into pieces with the same kernels, of which some run once a layer.
    Which kernel that is need not be known: of all names, the one is taken whose pieces are alike for the longest time
    on end (those of part of a step are not: only one of them has the head). Other pieces, such as the prefill's, are
    left out. Copies do not count: vLLM makes some of them only now and then.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for i, kernel in enumerate(found):
        if kernel.kind != "copies":
            places[kernel.name].append(i)
    best: list[list[Kernel]] = []
    longest = 0
    for at in places.values():
        pieces = [list(found[a:b]) for a, b in pairwise(at)]
        counts = [frozenset(Counter(k.name for k in piece if k.kind != "copies").items()) for piece in pieces]
        usual = Counter(counts).most_common(1)[0][0] if counts else frozenset()
        alike = [piece for piece, count in zip(pieces, counts, strict=True) if count == usual]
        runs = [0]
        for piece, count in zip(pieces, counts, strict=True):
            runs.append(runs[-1] + len(piece) if count == usual else 0)
        if max(runs) > longest and len(alike) > 2 and any(n == layers for _, n in usual):
            best, longest = alike, max(runs)
    if not best:
        raise TraceError(f"no steps of {layers} layers among the {len(found)} kernels of the trace")
    return best


def span(piece: Sequence[Kernel]) -> float:
    """Time that passes in a step or layer, us."""
    return sum(k.own + k.idle for k in piece)


def middle(pieces: Sequence[list[Kernel]]) -> list[list[Kernel]]:
    """The middle half by span: without those that something else disturbed."""
    ordered = sorted(pieces, key=span)
    quarter = len(ordered) // 4
    return ordered[quarter : len(ordered) - quarter]


def totals(pieces: Sequence[list[Kernel]]) -> dict[str, Any]:
    """``us`` of the mean step, ``idle_us`` of it, and ``kernels``: calls and own us a step, and the share, by name.

    Kernels are in the order of ``KINDS``, the longest first; their ``us`` and ``idle_us`` add up to ``us``.
    """
    count, us = len(pieces), sum(map(span, pieces)) / len(pieces)
    calls: Counter[tuple[str, str]] = Counter()
    own: dict[tuple[str, str], float] = defaultdict(float)
    for k in (k for piece in pieces for k in piece):
        calls[k.kind, k.name] += 1
        own[k.kind, k.name] += k.own
    rows = [
        {
            "kind": key[0],
            "name": key[1],
            "calls": round(calls[key] / count, 2),
            "us": round(own[key] / count, 2),
            "share": round(own[key] / count / us, 4),
        }
        for key in sorted(own, key=lambda key: (KINDS.index(key[0]), -own[key]))
    ]
    idle = sum(k.idle for piece in pieces for k in piece) / count
    return {"us": round(us, 2), "idle_us": round(idle, 2), "kernels": rows}


def layer(pieces: Sequence[list[Kernel]], layers: int) -> list[Kernel]:
    """The kernels of one layer in their order: of all layers that are as most are, the one of median span.

    It begins with a kernel that runs once a layer, the first of those in a step that find most layers alike.
    """
    once = [name for name, n in Counter(k.name for k in pieces[0] if k.kind != "copies").items() if n == layers]
    best: list[list[Kernel]] = []
    for name in once:
        cut: list[list[Kernel]] = []
        for piece in pieces:
            at = [i for i, k in enumerate(piece) if k.name == name]
            cut += [piece[a:b] for a, b in pairwise(at)]
        orders = [tuple(k.name for k in part) for part in cut]
        if not orders:
            continue
        usual = Counter(orders).most_common(1)[0][0]
        alike = [part for part, order in zip(cut, orders, strict=True) if order == usual]
        best = alike if len(alike) > len(best) else best
    if not best:
        raise TraceError("no kernel runs once in each of several layers")
    return sorted(best, key=span)[len(best) // 2]


def sequence(part: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Rows for kernels in their order; ``begins_us`` from the first, ``late_us`` and ``own_us`` as in ``Kernel``."""
    return [
        {
            "kind": k.kind,
            "name": k.name,
            "grid": k.grid,
            "begins_us": round(k.begin - part[0].begin, 2),
            "lasts_us": round(k.lasts, 2),
            "late_us": round(k.late, 2),
            "own_us": round(k.own, 2),
        }
        for k in part
    ]
