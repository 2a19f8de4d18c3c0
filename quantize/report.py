"""What the user sees of a run: stages, one progress bar with a time to go, the error of every layer as it is done."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quantize.parts import write_text
from vllm_vptq.format import LayerSpec

REPORT = "vptq_report.jsonl"


class Report:
    """Prints to a console; on a pipe or in a log, plain lines without the bar's redraws."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, start=False)

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, name: str) -> None:
        """Begins a part of the run."""
        self._bar.reset(self._task, description=escape(name), total=None)
        self.console.print(name, style="bold", markup=False)

    def progress(self, done: int, total: int) -> None:
        """Moves the bar of the current stage."""
        self._bar.update(self._task, completed=done, total=total)

    def plan(self, model: str, specs: Mapping[str, LayerSpec], weights: int, bits: float) -> None:
        """Says what is going to be done."""
        kinds = sorted({spec.format_name for spec in specs.values()})
        self.console.print(
            f"{model}: {len(specs)} linear layers, {weights / 1e6:.1f}M weights as {', '.join(kinds)}, "
            f"{bits:.2f} effective bits a weight ({weights * bits / 8 / 2**20:.1f} MiB)",
            markup=False,
            soft_wrap=True,
        )

    def note(self, text: str | None) -> None:
        """Says what the user should know before it takes hours, if there is anything."""
        if text:
            self.console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)

    def layer(self, name: str, spec: LayerSpec, error: float, done: int, total: int) -> None:
        """A layer is coded, with this error relative to the weight, in the norm that its inputs give."""
        self.progress(done, total)
        self.console.print(f"  {name:<44} {spec.format_name:<14} error {error:.2e}", style="dim", markup=False)

    def training(self, step: int, steps: int, loss: float) -> None:
        """A step of fine-tuning is done, with this loss."""
        self.progress(step, steps)
        if step == 1 or step % 10 == 0 or step == steps:
            self.console.print(f"  step {step} of {steps}: loss {loss:.4f}", style="dim", markup=False)

    def block_tuned(self, name: str, before: float, after: float) -> None:
        """A block is trained; the error of its output, relative to the output."""
        self.console.print(f"  {name} trained: error {before:.2e} -> {after:.2e}", style="dim", markup=False)

    def block(self, name: str, seconds: float) -> None:
        """A block is written."""
        self.console.print(f"{name} in {seconds:.1f} s", markup=False)

    def write(self, out: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes what is known of every layer and of trainings to ``vptq_report.jsonl``, a line each."""
        write_text(out / REPORT, "".join(json.dumps(record) + "\n" for record in records))


def seconds_by_step(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The seconds that each step of coding took in all layers, of a report's records; those of trainings have none."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for record in records:
        for step, spent in record.get("step_seconds", {}).items():
            seconds[step] += spent
    return dict(seconds)
