"""The picture of a comparison: tokens per second over the batch, and what the weights take."""

from __future__ import annotations

from pathlib import Path

from vllm_vptq.bench.results import Results


def draw(results: Results, path: Path) -> None:
    """Writes ``path`` in the format of its suffix. ImportError where matplotlib is missing (the extra ``plot``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speeds, sizes = figure.subplots(1, 2, width_ratios=[2, 1])
    labels = []
    for row in results.models:
        own = results.rows_of(row)
        more = [name for name in (row["layout"],) if name not in (None, "auto")]
        more += [f"tp {row['tp']}"] * (row["tp"] > 1)
        labels.append(f"{row['model']} ({', '.join([row['format'], *more])})")
        style = {"dense": "--", "w4a16": ":"}.get(row["kind"], "-")
        speeds.plot([r["batch"] for r in own], [r["tokens_per_s"] for r in own], style, marker="o", label=labels[-1])
    speeds.set(xscale="log", yscale="log", xlabel="sequences at once", ylabel="tokens per second", title="Decoding")
    speeds.set_xticks(results.batches, [str(batch) for batch in results.batches])
    speeds.minorticks_off()
    speeds.grid(alpha=0.3)
    speeds.legend(fontsize="small")
    bars = sizes.barh(labels, [row["weight_gib"] for row in results.models])
    for bar, color in zip(bars, (line.get_color() for line in speeds.get_lines()), strict=True):
        bar.set_color(color)
    sizes.bar_label(bars, fmt="%.2f", padding=3)
    sizes.margins(x=0.2)
    sizes.invert_yaxis()
    sizes.set(xlabel="GiB a card", title="Weights")
    sizes.tick_params(axis="y", labelleft=False)
    gpu, versions = results.head["gpu"] or "CPU", results.head["versions"]
    figure.suptitle(f"{gpu}, vLLM {versions.get('vllm', '?')}, {results.head['date']}", fontsize="medium")
    figure.savefig(path)
