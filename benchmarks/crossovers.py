"""Makes a row of vllm_vptq/layouts/crossovers.json out of the results of benchmarks/kernels.py.

    python -m benchmarks.kernels --tokens 1 8 64 1024 --direct 64 --layouts stationary --out stationary.json
    python -m benchmarks.kernels --tokens 1 4 8 1024 --direct 8 --layouts compact --out compact.json
    python -m benchmarks.crossovers 9.0 stationary.json compact.json

Looking up costs the time of one launch for every 64 tokens (8 in the compact layout); decoding costs what a call with
many tokens takes beyond the dense product. They meet where the launches cost as much as decoding and a dense product.
The median over layers and formats is taken for each class of layers (``choice.crossover``). The aligned layout has the
classes of the stationary one, whose kernels it shares at these counts; results may be of either.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from vllm_vptq.format import parse_format
from vllm_vptq.layouts import choice, stationary

LAUNCH_TOKENS = {"stationary": 64, "aligned": 64, "compact": 8}
DECODED_TOKENS = 1024


def crossovers(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens at which decoding overtakes, by class; of rows that hold both for a layer and format."""
    calls = {(row["format"], row["layer"], row["layout"], row["tokens"]): row for row in rows}
    found: dict[str, list[float]] = defaultdict(list)
    for (name, layer, layout, tokens), decoded in calls.items():
        step = LAUNCH_TOKENS[layout]
        launch = calls.get((name, layer, layout, step))
        if tokens != DECODED_TOKENS or launch is None:
            continue
        decoding = decoded["us"] - decoded["dense_us"]
        found[_class(name, layout)].append(step * (decoding + launch["dense_us"]) / launch["us"])
    return {name: round(statistics.median(tokens)) for name, tokens in sorted(found.items())}


def _class(name: str, layout: str) -> str:
    if layout == "compact":
        return layout
    _, k, r = parse_format(name)
    return stationary.class_of(max(k, r))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", help="of the GPU that was measured, for example 9.0")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--table", type=Path, default=Path(choice.__file__).with_name("crossovers.json"))
    arguments = parser.parse_args()
    found = crossovers([row for path in arguments.results for row in json.loads(path.read_text())["rows"]])
    table = json.loads(arguments.table.read_text())
    table[arguments.capability] = table["default"] | found
    arguments.table.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(table[arguments.capability], indent=2))


if __name__ == "__main__":
    main()
