"""Perplexity over effective bits, a line for every method, from results of quality.py and scalar.py.

    python -m benchmarks.plot_quality benchmarks/results/quality-DATE-MODEL.json [...] docs/quality.svg

Of several files the rows are taken that have the model and the text of the first file's first row, as much of it and in
windows as long, and its perplexity of the original: texts of one name may differ. Rows that change their preset
(``best:2:{"curvature": false}``) are left out. Of several rows of one method asked for the same bits the last is taken.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

NAMES = {"rtn": "round to nearest", "gptq": "GPTQ (llm-compressor)"}
EVALUATION = ("model", "text", "context", "tokens")


def main() -> None:
    """Draws the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=float, default=16.0, help="perplexity times the original's at the top edge")
    arguments = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "vptq"  # or every drawing would differ in its ids
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters, not their outlines: a file of half the size
    rows = [row for file in arguments.results for row in json.loads(file.read_text())["rows"] if "method" in row]
    original = rows[0]["original_perplexity"]
    rows = [
        row
        for row in rows
        if "{" not in row["name"]
        and all(row[name] == rows[0][name] for name in EVALUATION)
        and math.isclose(row["original_perplexity"], original, rel_tol=1e-3)
    ]
    lines: dict[str, dict[float, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        asked = row["recipe"].get("bits") or row["effective_bits"]
        lines[row["method"]][asked] = row["effective_bits"], row["perplexity"]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for method, points in lines.items():
        along = zip(*sorted(points.values()), strict=True)
        axes.plot(*along, marker="o", markersize=4, label=NAMES.get(method, method))
    axes.axhline(original, color="black", linewidth=0.8, linestyle=":", label=f"original ({original:.2f})")
    axes.set(yscale="log", ylim=(original * 0.97, original * arguments.most))
    axes.set(xlabel="effective bits a weight: indices, books, scales, zeros", ylabel="perplexity")
    axes.set_title(f"{rows[0]['model']}, {rows[0]['tokens']:,} tokens in windows of {rows[0]['context']}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(arguments.out, metadata={"Date": None}, format="svg")


if __name__ == "__main__":
    main()
