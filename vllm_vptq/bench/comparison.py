"""Runs a comparison: one model after the other, each figure shown and kept as it comes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm_vptq.bench import plot, process, table
from vllm_vptq.bench.results import Results, default_path
from vllm_vptq.bench.settings import BenchError, Contestant, Settings
from vllm_vptq.extras import how_to_install


def run(contestants: Sequence[Contestant], settings: Settings, path: Path | None, console: Console) -> bool:
    """Measures all, prints tables, writes ``path`` and a picture beside it; whether none of them failed.

    A model that fails is reported in one line, and the next one is measured. BenchError for settings or a file that
    cannot be used.
    """
    settings.check()
    results = Results(path or default_path(), settings)
    # As an exception, so that the worker is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = False
    for contestant in contestants:
        try:
            with console.status(Text(f"{contestant.title}: starting vLLM")) as status:
                for event in process.run(contestant, settings):
                    results.add(contestant, settings.tp, event)
                    console.print(Text(f"{contestant.title}: {sentence(event)}"), soft_wrap=True)
                    status.update(Text(f"{contestant.title}: measuring"))
        except BenchError as error:
            failed = True
            console.print(Text(f"error: {error}", "red"), soft_wrap=True)
    finish(results, console)
    return not failed


def finish(results: Results, console: Console) -> None:
    """Prints the tables and draws the picture, if anything was measured."""
    if results.models:
        console.print()
        table.show(results, console)
        console.print(Text(f"\nwritten to {results.path}{_draw(results)}"), soft_wrap=True)


def sentence(event: dict[str, Any]) -> str:
    """An event for people."""
    match event["event"]:
        case "started":
            return (
                f"started in {event['start_s']:.0f} s on {event['device']}{_loading(event)}, "
                f"{event['weight_gib']:.2f} GiB of weights, room for {event['kv_cache_tokens']:,} tokens"
            )
        case "first_token":
            return f"first token after {event['first_token_ms']:.1f} ms"
        case _:
            return (
                f"batch {event['batch']}: {event['ms_per_step']:.2f} ms a step, {event['tokens_per_s']:,.0f} tokens/s"
            )


def _loading(event: dict[str, Any]) -> str:
    return f" ({event['load_s']:.1f} s of it loading)" if event.get("load_s") else ""


def _draw(results: Results) -> str:
    picture = results.path.with_suffix(".svg")
    try:
        plot.draw(results, picture)
    except ImportError:
        return f"; for a picture too, {how_to_install('plot')}"
    return f" and {picture}"
