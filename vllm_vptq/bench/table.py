"""The results of a comparison as tables, each figure with its ratio to the dense model's."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_vptq.bench.results import Results, Row


def show(results: Results, console: Console) -> None:
    """Prints memory and times of each model, then its tokens per second at each batch."""
    sizes = _table("model", "format", "tp", "start s", "load s", "weights GiB", "KV tokens", "first token ms")
    for row in results.models:
        dense = results.dense(results.models, row)
        cells = [_cell(row, None, "load_s", 1), *(_cell(row, dense, *size) for size in _SIZES.items())]
        sizes.add_row(*map(Text, (*_names(row), f"{row['start_s']:.0f}", *cells)))
    speeds = _table("model", "format", "tp", *(f"batch {batch}" for batch in results.batches))
    for row in results.models:
        own = {r["batch"]: _cell(r, results.dense(results.rows, r), "tokens_per_s", 0) for r in results.rows_of(row)}
        speeds.add_row(*map(Text, (*_names(row), *(own.get(batch, "-") for batch in results.batches))))
    console.print(sizes)
    console.print("\ndecoding, tokens per second (in brackets: times the dense model on as many cards)", style="dim")
    console.print(speeds)
    if results.rooms:
        rooms = _table("model", "format", "of a card's GB", "weights GiB", "KV tokens")
        for row in results.rooms:
            room = (f"{row['card_gb']:g}", f"{row['weight_gib']:.2f}", f"{row['kv_cache_tokens']:,}")
            rooms.add_row(*map(Text, (*_names(row)[:2], *room)))
        console.print("\nroom for the KV cache on a smaller card", style="dim")
        console.print(rooms)


_SIZES = {"weight_gib": 2, "kv_cache_tokens": 0, "first_token_ms": 1}
"""Of an entry of ``models``, with the decimal places to show."""


def _names(row: Row) -> tuple[str, str, str]:
    asked = "" if row["layout"] in (None, "auto") else f", {row['layout']}"
    return row["model"], f"{row['format']}{asked}", str(row["tp"])


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "format") else "right", overflow="fold")
    return table


def _cell(row: Row, dense: Row | None, name: str, places: int) -> str:
    if row.get(name) is None:
        return "-"
    ratio = f" ({row[name] / dense[name]:.2f}x)" if dense and dense is not row and dense.get(name) else ""
    return f"{row[name]:,.{places}f}{ratio}"
