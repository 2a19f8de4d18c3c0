"""The tables of docs/serving.md from a file of results: ``python -m benchmarks.serving_tables RESULTS.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PUBLISHED = {
    "v8-k256-256": 5.22,
    "v8-k65536-256": 5.21,
    "v8-k65536-65536": 2.10,
    "v16-k65536-65536": 2.02,
    "v8-k65536-0": 3.77,
}
"""Tokens/s of Qwen2.5 on an A2 with the reference implementation: https://github.com/microsoft/VPTQ/issues/86"""
OLLAMA = {"q6_K": 10.06, "q5_0": 14.30}
"""The same model on the same A2 with Ollama, there too."""
MISSING = "not measured yet"
SHAPES = {
    "32 layers of 4096": "Llama-3.1-8B",
    "48 layers of 5120": "Qwen2.5-14B",
    "80 layers of 8192": "Llama-3.1-70B",
}


def tables(results: dict[str, Any]) -> str:
    """All tables that the file has figures for, in Markdown."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for model in results["models"]:
        groups.setdefault((model["shape"], model["dtype"]), []).append(model)
    parts = [decoding(SHAPES.get(shape, shape), dtype, rows, results) for (shape, dtype), rows in groups.items()]
    if any(row["shape"] == "48 layers of 5120" for row in results["rows"]):
        parts.append(published(results))
    if results.get("rooms"):
        parts.append(rooms(results["rooms"]))
    return "\n\n".join(parts)


def decoding(title: str, dtype: str, models: list[Row], results: dict[str, Any]) -> str:
    """Weights, loading, first token and tokens/s of models of one shape; in brackets times the dense model's."""
    rows = [row for row in results["rows"] if any(_of(row, model) for model in models)]
    batches = sorted({row["batch"] for row in rows})
    lines = [
        f"{title}, {dtype}:\n",
        "| | cards | GiB a card | loaded in | first token | " + " | ".join(f"batch {b}" for b in batches) + " |",
        "|---" * (5 + len(batches)) + "|",
    ]
    for model in models:
        base = next((m for m in models if m["kind"] == "dense" and m["tp"] == model["tp"]), None)
        own, dense = ({r["batch"]: r for r in rows if m and _of(r, m)} for m in (model, base))
        cells = [_name(model), str(model["tp"]), f"{model['weight_gib']:.1f}"]
        cells.append(f"{model['load_s']:.0f} s" if model["kind"] == "vptq" and model.get("load_s") else "")
        cells.append(_ratio(model, base, "first_token_ms", "{:.0f} ms"))
        cells += [_ratio(own.get(b), dense.get(b), "tokens_per_s", "{:,.0f}") for b in batches]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published(results: dict[str, Any]) -> str:
    """Qwen2.5-14B, one sequence, beside what others published of it."""
    gpu = results["gpu"] or "here"
    ours = {r["format"]: r["tokens_per_s"] for r in results["rows"] if r["shape"].startswith("48 ") and r["batch"] == 1}
    lines = [f"| Qwen2.5-14B, tokens/s, one sequence | A2, as published | {gpu}, here |", "|---|---|---|"]
    lines += [f"| Ollama (llama.cpp) {name} | {value:.1f} | |" for name, value in OLLAMA.items()]
    for name, value in PUBLISHED.items():
        own = f"{ours[name]:.0f}" if name in ours else MISSING
        lines.append(f"| VPTQ {name} | {value:.1f} (reference implementation) | {own} |")
    rest = {name: value for name, value in ours.items() if name not in PUBLISHED}
    return "\n".join([*lines, *(f"| {name} | | {value:.0f} |" for name, value in rest.items())])


def rooms(rows: list[Row]) -> str:
    """Tokens that the KV cache has room for on a smaller card."""
    dense = next((row["kv_cache_tokens"] for row in rows if row["kind"] == "dense"), None)
    lines = [f"| {rows[0]['card_gb']:g} GB card | weights | room in the KV cache |", "|---|---|---|"]
    for row in rows:
        ratio = f" ({row['kv_cache_tokens'] / dense:.2f}x)" if dense and row["kind"] != "dense" else ""
        lines.append(f"| {_name(row)} | {row['weight_gib']:.1f} GiB | {row['kv_cache_tokens']:,} tokens{ratio} |")
    return "\n".join(lines)


def _name(model: Row) -> str:
    return model["format"] + (f", `{model['layout']}`" if model["layout"] else "")


def _of(row: Row, model: Row) -> bool:
    return all(row[name] == model[name] for name in ("model", "layout", "tp"))


def _ratio(row: Row | None, dense: Row | None, name: str, form: str) -> str:
    if row is None or row.get(name) is None:
        return ""
    value = form.format(row[name])
    return f"{value} ({row[name] / dense[name]:.2f}x)" if dense and row["kind"] != "dense" and name in dense else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what benchmarks.serving has written")
    print(tables(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
