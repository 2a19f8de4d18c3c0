"""Makes a row of vllm_vptq/layouts/crossovers.json out of the results of benchmarks/kernels.py.

    python -m benchmarks.kernels --norm --tokens 8 16 32 64 128 1024 --direct 128 --layouts stationary --out wide.json
    python -m benchmarks.kernels --norm --tokens 1 2 4 8 1024 --direct 8 --layouts compact --out compact.json
    python -m benchmarks.crossovers 9.0 wide.json compact.json

Looking up costs whole launches: the largest that was measured (LAUNCH_TOKENS at most) as often as it fits, and for the
rest the smallest that holds it, so the counts to measure are the most that each kernel variant takes. Decoding costs
what a call with many tokens takes beyond the dense product, and a dense product, whose time between two measured counts
is interpolated. The crossover is the last count up to which looking up is never slower. The median over layers,
formats, norms and groups is taken for each class of layers (``choice.crossover``), so give it rows like the layers to
be served: with norms. The aligned layout has the classes of the stationary one, whose kernels it shares here.
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
        key = row["format"], row["layout"], row["layer"], row.get("norm", False), row.get("groups", 1)
        layers[key][row["tokens"]] = row
    found: dict[str, list[int]] = defaultdict(list)
    for (name, layout, *_), calls in layers.items():
        launches = {tokens: row["us"] for tokens, row in calls.items() if tokens <= LAUNCH_TOKENS[layout]}
        if launches and DECODED_TOKENS in calls:
            found[_class(name, layout)].append(_crossover(launches, calls))
    return {name: round(statistics.median(tokens)) for name, tokens in sorted(found.items())}


def _crossover(launches: dict[int, float], calls: dict[int, Row]) -> int:
    """The last count up to which ``launches`` (us by the tokens they take) are as quick as decoding."""
    step, decoded = max(launches), calls[DECODED_TOKENS]
    decoding = decoded["us"] - decoded["dense_us"]

    def looking_up(tokens: int) -> float:
        whole, rest = divmod(tokens, step)
        return whole * launches[step] + (launches[min(t for t in launches if t >= rest)] if rest else 0.0)

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
    _, k, r = parse_format(name)
    return stationary.class_of(max(k, r))


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
    # Classes that were not measured keep the default's tokens, and nothing says where those were measured.
    row = {"tokens": table["default"]["tokens"] | found, "measured": dict.fromkeys(found, origin)}
    table[arguments.capability] = row
    arguments.table.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(row, indent=2))


def _origin(result: dict[str, Any]) -> str:
    commits = dict.fromkeys(row["commit"] for row in result["rows"])
    return f"{result['gpu']}, {result['date']}, {' and '.join(commits)}"


if __name__ == "__main__":
    main()
