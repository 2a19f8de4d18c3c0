"""The serving comparison of docs/serving.md, on all GPUs of a machine: checkpoints are made, engines run, rows kept.

``vllm-vptq bench`` measures one model after the other, and waits a minute for each engine. Here several engines start
at a time on every GPU; once all of a GPU have, they measure in turn, each alone on it: one that waits does nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from benchmarks.memory import CARD_GB
from benchmarks.synthesize import DENSE, W4A16, synthesize
from vllm_vptq.bench import comparison, process
from vllm_vptq.bench.results import Results, default_path, same
from vllm_vptq.bench.settings import BenchError, Contestant, Settings
from vllm_vptq.doctor import machine

KV_GIB = 6.0
"""Of every engine's cache: enough for all batches, and the same beside others, who disturb vLLM's own measurement."""
SETTINGS = Settings(kv_cache_gib=KV_GIB, gpu_memory_utilization=0.1)
"""A cache of fixed size has no use for the utilization, but vLLM will not start where less is free."""
OTHER_GIB = 6.0
"""Of every engine: activations of the longest prompts, CUDA graphs, its context."""
USABLE = 0.9
"""Of a card, for engines."""
MODELS = {"8b": "Llama-3.1-8B", "14b": "Qwen2.5-14B", "70b": "Llama-3.1-70B"}


@dataclass(frozen=True)
class Entry:
    """An engine to start. ``gib``: of weights on each card, about. ``room``: only to see how much cache fits a card."""

    model: str
    format: str
    gib: float
    batches: tuple[int, ...]
    layout: str | None = None
    tp: int = 1
    dtype: str = "float16"
    room: bool = False

    @property
    def name(self) -> str:
        """What the user calls it."""
        more = [self.layout or ""] * (self.layout in ("aligned", "compact")) + [f"tp{self.tp}"] * (self.tp > 1)
        kind = ["room"] * self.room + ["bf16"] * (self.dtype == "bfloat16")
        return "-".join([*kind, self.model, self.format, *more])

    @property
    def folder(self) -> str:
        """Where its checkpoint lies."""
        return "-".join([self.model, self.format, *["bf16"] * (self.dtype == "bfloat16")])

    def settings(self, card_bytes: int) -> Settings:
        """``card_bytes``: memory of a card, for ``room``."""
        if not self.room:
            return replace(SETTINGS, tp=self.tp, batches=self.batches)
        return Settings(
            batches=(256,), max_model_len=8192, max_num_batched_tokens=2048, enforce_eager=True,
            gpu_memory_utilization=round(0.9 * CARD_GB * 1e9 / card_bytes, 5),
        )  # fmt: skip

    def contestant(self, models: Path) -> Contestant:
        """Its checkpoint, in its layout."""
        kind = self.format if self.format in (DENSE, W4A16) else "vptq"
        return replace(Contestant.find(models / self.folder, kind), layout=self.layout)


def plan() -> list[Entry]:
    """All of the comparison, what matters most first. Every VPTQ checkpoint has norms, as public ones do."""
    few, all_ = (1, 8, 32, 64), (1, 8, 32, 64, 256)
    fast = {"v8-k65536-0": 7.3, "v8-k256-256": 3.6, "v12-k4096-4096": 4.2, "v8-k65536-256": 8.1}
    qwen = {"v8-k256-256": 6.0, "v8-k65536-256": 15.0, "v8-k65536-65536": 23.0, "v16-k65536-65536": 16.0}
    small = [
        Entry("8b", DENSE, 15.0, all_),
        Entry("8b", W4A16, 5.4, all_),
        *(Entry("8b", name, gib, all_, "stationary") for name, gib in fast.items()),
    ]
    small_aligned = Entry("8b", "v8-k65536-0", 3.8, few, "aligned")
    return [
        *small,
        Entry("70b", "v8-k65536-0", 54.5, (1, 8, 32), "stationary"),
        Entry("70b", "v8-k65536-0", 20.5, (1, 8), "aligned"),
        Entry("70b", "v8-k65536-0", 20.5, (1,), "compact"),
        Entry("70b", "v8-k65536-0", 27.5, (1, 8, 32), "stationary", tp=2),
        Entry("70b", "v8-k65536-0", 14.0, (1, 8, 32), "stationary", tp=4),
        Entry("14b", DENSE, 27.5, (1, 8)),
        Entry("14b", W4A16, 9.5, (1, 8)),
        *(Entry("14b", name, gib, (1, 8), "stationary") for name, gib in (qwen | {"v8-k65536-0": 13.0}).items()),
        small_aligned,
        *(replace(entry, room=True) for entry in small[:4]),
        Entry("70b", W4A16, 37.0, (1, 8, 32)),
        Entry("70b", DENSE, 66.0, (1, 8, 32), tp=2),
        Entry("8b", DENSE, 15.0, few, dtype="bfloat16"),
        Entry("8b", "v8-k65536-0", 7.3, few, "stationary", dtype="bfloat16"),
        Entry("8b", "v8-k256-256", 3.6, few, "stationary", dtype="bfloat16"),
        Entry("8b", DENSE, 7.8, few, tp=2),
        Entry("8b", W4A16, 3.2, few, tp=2),
        Entry("8b", "v8-k256-256", 2.3, few, "stationary", tp=2),
        Entry("8b", "v8-k65536-0", 4.2, few, "stationary", tp=2),
    ]


# ---------------------------------------------------------------------------------------------------------------
# Engines side by side


@dataclass(frozen=True)
class Placed:
    """An entry and the cards it gets."""

    entry: Entry
    cards: tuple[int, ...]


def waves(entries: list[Entry], cards: int, per_card: int, card_gib: float) -> list[list[Placed]]:
    """Who runs at a time: in order, on the cards with most room; one that asks for the room of a card has it alone."""
    made: list[list[Placed]] = []
    free: list[float] = []
    count: list[int] = []
    for entry in entries:
        need = entry.gib + KV_GIB + OTHER_GIB
        open_cards = [c for c in range(len(free)) if count[c] < (1 if entry.room else per_card) and free[c] >= need]
        if not made or len(open_cards) < entry.tp or entry.room != made[-1][0].entry.room:
            made.append([])
            free, count, open_cards = [card_gib * USABLE] * cards, [0] * cards, list(range(cards))
        chosen = sorted(open_cards, key=lambda c: (-free[c], c))[: entry.tp]
        for c in chosen:
            free[c] -= need
            count[c] += 1
        made[-1].append(Placed(entry, tuple(sorted(chosen))))
    return made


class Turns:
    """Who may use a card: one that has started, while none starts there or measures."""

    def __init__(self, wave: list[Placed]) -> None:
        self._changed = threading.Condition()
        self._state = dict.fromkeys(wave, "starting")

    def wait(self, placed: Placed) -> None:
        """Until it is the turn of ``placed``, in the order of the wave."""
        with self._changed:
            self._state[placed] = "ready"
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._next(placed))
            self._state[placed] = "measuring"

    def done(self, placed: Placed) -> None:
        with self._changed:
            self._state[placed] = "done"
            self._changed.notify_all()

    def _next(self, placed: Placed) -> bool:
        before = True
        for other, state in self._state.items():
            before = before and other != placed
            beside = other != placed and set(other.cards) & set(placed.cards)
            if beside and (state in ("starting", "measuring") or (before and state == "ready")):
                return False
        return True


@dataclass(frozen=True)
class Run:
    """``limit_s`` is the time an engine has to start, and then to measure."""

    models: Path
    results: Results
    console: Console
    limit_s: float
    card_bytes: int

    def wave(self, wave: list[Placed]) -> bool:
        """Runs engines at a time; whether all went well."""
        wanted = len(wave)
        wave = [placed for placed in wave if self._write(placed.entry)]
        turns, lock = Turns(wave), threading.Lock()

        def one(placed: Placed) -> bool:
            entry, contestant = placed.entry, placed.entry.contestant(self.models)
            events = process.run(
                contestant, entry.settings(self.card_bytes), environment(placed, len(wave)), self.limit_s
            )
            try:
                for event in events:
                    with lock:
                        self._take(entry, contestant, event, len(wave))
                    if entry.room:
                        break
                    if event["event"] == "started":
                        turns.wait(placed)
            except BenchError as error:
                with lock:
                    self.console.print(Text(f"error: {entry.name}: {error}", "red"), soft_wrap=True)
                return False
            finally:
                events.close()
                turns.done(placed)
            return True

        with ThreadPoolExecutor(wanted) as pool:
            try:
                futures = [pool.submit(one, placed) for placed in wave]
                return sum(future.result() for future in futures) == wanted
            finally:
                process.end_all()

    def _write(self, entry: Entry) -> bool:
        """Writes an entry's checkpoint if it is not there; whether it is."""
        folder = self.models / entry.folder
        if folder.exists():
            return True
        begin, partial = time.monotonic(), self.models / f".{folder.name}"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        try:
            synthesize(partial, MODELS[entry.model], entry.format, dtype=entry.dtype)
        except OSError as error:
            self.console.print(f"[red]error:[/red] {entry.name}: cannot write {partial}: {error.strerror}")
            shutil.rmtree(partial, ignore_errors=True)
            return False
        partial.rename(folder)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**30
        self.console.print(f"{folder.name}: {size:.1f} GiB written in {time.monotonic() - begin:.0f} s")
        return True

    def _take(self, entry: Entry, contestant: Contestant, event: dict[str, object], beside: int) -> None:
        if entry.room:
            self.results.add_room(contestant, CARD_GB, event)
        else:
            # Engines that start side by side start more slowly.
            more = {"started_at_once": beside} if event["event"] == "started" else {}
            self.results.add(contestant, entry.tp, event | more)
        self.console.print(Text(f"{entry.name}: {comparison.sentence(event)}"), soft_wrap=True)

    def has(self, entry: Entry) -> bool:
        """Whether the file has all of an entry."""
        folder = self.models / entry.folder
        key = {"model": folder.name, "layout": entry.layout, "tp": entry.tp}
        if entry.room:
            return any(same(row, key) for row in self.results.rooms)
        return {row["batch"] for row in self.results.rows if same(row, key)} >= set(entry.batches)


def environment(placed: Placed, engines: int) -> dict[str, str]:
    """Of an engine: its cards, its share of the processor, nothing from outside."""
    ids = machine.cards() or [""]
    share = max(1, (os.cpu_count() or 1) // engines)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(ids[card] for card in placed.cards),
        "OMP_NUM_THREADS": str(min(share, 8)),
        "TORCHINDUCTOR_COMPILE_THREADS": str(share),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # NVLink multicast is a resource of the whole host; other users of it may not like to share it.
        "NCCL_NVLS_ENABLE": "0",
        "NVSHMEM_DISABLE_NVLS": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    }


# ---------------------------------------------------------------------------------------------------------------
# Command line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Only entries that begin with one of these.")] = None,
    models: Annotated[Path, typer.Option(help="Where checkpoints are, or are written (4 to 20 GiB each).")] = Path(
        ".cache/serving"
    ),
    out: Annotated[Path | None, typer.Option(help="JSON to write or to continue.")] = None,
    per_card: Annotated[int, typer.Option(min=1, help="Engines that start at a time on a GPU.")] = 6,
    limit: Annotated[float, typer.Option(help="Seconds an engine may take to start, and then to measure.")] = 240,
    show: Annotated[bool, typer.Option("--list", help="Print what would run, and stop.")] = False,
) -> None:
    """Measures the comparison of docs/serving.md, as far as the GPUs here allow. What the file has is not run again.

    python -m benchmarks.serving 8b 70b --out serving.json
    """
    console = Console(highlight=False)
    gpus = machine.gpus()
    cards, card_bytes = (gpus[0].count, gpus[0].memory) if gpus else (1, 24 << 30)
    try:
        results = Results(out or default_path(), SETTINGS)
    except BenchError as error:
        console.print(Text(f"error: {error}", "red"), soft_wrap=True)
        sys.exit(1)
    run = Run(models, results, console, limit, card_bytes)
    chosen = [
        entry
        for entry in plan()
        if entry.tp <= cards and not run.has(entry) and (not names or entry.name.startswith(tuple(names)))
    ]
    order = waves(chosen, cards, per_card, card_bytes / 2**30)
    for i, wave in enumerate(order):
        words = (f"{placed.entry.name} ({' '.join(map(str, placed.cards))})" for placed in wave)
        console.print(f"{i + 1}: {', '.join(words)}", soft_wrap=True)
    if show:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    models.mkdir(parents=True, exist_ok=True)
    if gpus:  # so that engines need not wait for the compiler
        subprocess.run(
            [sys.executable, "-c", "from vllm_vptq.build import cuda_extension; cuda_extension()"], check=True
        )
    begin = time.monotonic()
    complete = True
    for i, wave in enumerate(order):
        complete = run.wave(wave) and complete
        console.print(f"{i + 1} of {len(order)} after {time.monotonic() - begin:.0f} s")
    comparison.finish(results, console)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    app()
