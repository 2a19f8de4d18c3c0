"""Makes a row of vllm_vptq/layouts/crossovers.json out of the results of benchmarks/kernels.py.

    python -m benchmarks.kernels --norm --tokens 8 16 32 64 128 256 384 512 1024 --direct 512 --layouts stationary \
        --out wide.json
    python -m benchmarks.kernels --norm --tokens 1 2 4 8 1024 --direct 8 --layouts compact --out compact.json
    python -m benchmarks.crossovers 9.0 wide.json compact.json

Looking up costs whole launches: the largest that was measured (LAUNCH_TOKENS at most) as often as it fits, or the call
of as many of them that was measured; and for the rest the smallest that holds it; but never more than a larger call. So
the counts to measure are the most that each kernel variant takes, and multiples of the largest. Decoding costs what a
call with many tokens takes beyond the dense product, and a dense product, whose time between two measured counts is
interpolated. The crossover is the last count up to which looking up is never slower. The median over layers, formats,
norms and groups is taken for each class of layers (``choice.crossover``), so give it rows like the layers to be served:
with norms. The aligned layout has the classes of the stationary one, whose kernels it shares here.

Classes that no row is of keep what was measured before, or else the default's tokens, for which there is no source.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_vptq.format import parse_format
from vllm_vptq.layouts import choice, stationary

LAUNCH_TOKENS = {"stationary": 128, "aligned": 128, "compact": 8}
DECODED_TOKENS = 1024


Row = dict[str, Any]


def crossovers(rows: list[Row]) -> dict[str, int]:
    """Tokens at which decoding overtakes, by class; of rows that hold both for a layer and format."""
    layers: dict[tuple[Any, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        key = row["format"], row["layout"], row["layer"], row.get("norm", False), row.get("groups", 1), row.get("dtype")
        layers[key][row["tokens"]] = row
    found: dict[str, list[int]] = defaultdict(list)
    for (name, layout, *_), calls in layers.items():
        most = LAUNCH_TOKENS[layout]
        # Older rows do not say up to how many tokens weights were looked up; those of a launch were.
        looked_up = {tokens: row["us"] for tokens, row in calls.items() if tokens <= row.get("direct", most)}
        if min(looked_up, default=most + 1) <= most and DECODED_TOKENS in calls:
            found[_class(name, layout)].append(_crossover(looked_up, calls, most))
    return {name: round(statistics.median(tokens)) for name, tokens in sorted(found.items())}


def _crossover(looked_up: dict[int, float], calls: dict[int, Row], most: int) -> int:
    """The last count up to which looking up (us by tokens, launches of up to ``most``) is as quick as decoding."""
    step, decoded = max(tokens for tokens in looked_up if tokens <= most), calls[DECODED_TOKENS]
    decoding = decoded["us"] - decoded["dense_us"]

    def looking_up(tokens: int) -> float:
        rest = tokens % step
        whole = tokens - rest
        launches = looked_up.get(whole, whole // step * looked_up[step])
        launches += looked_up[min(t for t in looked_up if t >= rest)] if rest else 0.0
        return min([launches, *(us for t, us in looked_up.items() if t >= tokens)])

    def dense(tokens: int) -> float:
        after = min(t for t in calls if t >= tokens)
        before = max((t for t in calls if t <= tokens), default=after)
        share = (tokens - before) / max(1, after - before)
        return (1 - share) * calls[before]["dense_us"] + share * calls[after]["dense_us"]

    counts = range(1, DECODED_TOKENS)
    return next((t - 1 for t in counts if looking_up(t) > decoding + dense(t)), DECODED_TOKENS)


def _class(name: str, layout: str) -> str:
    if layout == "compact":
        return layout
    v, *books = parse_format(name)
    smaller, larger = sorted(max(1, entries).bit_length() - 1 for entries in books)
    return stationary.class_of(v, larger, smaller)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", help="of the GPU that was measured, for example 9.0")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--table", type=Path, default=Path(choice.__file__).with_name("crossovers.json"))
    arguments = parser.parse_args(words)
    results = [json.loads(path.read_text()) for path in arguments.results]
    found = crossovers([row for result in results for row in result["rows"]])
    table = json.loads(arguments.table.read_text())
    origin = "; ".join(map(_origin, results))
    assumed = table["default"]["tokens"]
    before = table.get(arguments.capability, {"tokens": {}, "measured": {}})
    tokens, origins = before["tokens"] | found, before["measured"] | dict.fromkeys(found, origin)
    measured = {name: origins[name] for name in assumed if name in origins}
    row = {"tokens": assumed | {name: tokens[name] for name in measured}, "measured": measured}
    table[arguments.capability] = row
    arguments.table.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(row, indent=2))


def _origin(result: dict[str, Any]) -> str:
    commits = dict.fromkeys(row["commit"] for row in result["rows"])
    return f"{result['gpu']}, {result['date']}, {' and '.join(commits)}"


if __name__ == "__main__":
    main()
