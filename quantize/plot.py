"""A picture of a run: every layer's bits and error, in the order of the model."""

from __future__ import annotations

import json
from pathlib import Path

from quantize.errors import QuantizeError
from quantize.report import REPORT
from vllm_vptq.extras import how_to_install


def draw(report: Path, out: Path) -> None:
    """Draws a report (``vptq_report.jsonl`` or its directory) into an image file; needs the extra ``plot``."""
    path = report / REPORT if report.is_dir() else report
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
        records = [line for line in lines if "layer" in line]
        points = [(r["layer"].rpartition(".")[2], i, r["error"], r["bits"]) for i, r in enumerate(records)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantizeError(f"{path}: no readable report ({error})") from error
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QuantizeError(f"a plot needs matplotlib: {how_to_install('plot')}") from error
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for leaf in dict.fromkeys(point[0] for point in points):
        _, at, errors, bits = zip(*(point for point in points if point[0] == leaf), strict=True)
        top.semilogy(at, errors, "o-", markersize=3, label=leaf)
        bottom.plot(at, bits, "o-", markersize=3)
    top.set_ylabel("relative error")
    top.legend(ncols=4, fontsize="small")
    bottom.set_ylabel("effective bits")
    bottom.set_xlabel("layer")
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise QuantizeError(f"cannot write {out}: {error}") from error
