"""``python -m tests.engine``: runs the list on the GPUs of this machine, and ends with a table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.engine.cases import Case, Real, all_cases
from tests.engine.runner import Runner
from tests.engine.worker import ROOT
from vllm_vptq.bench.checkout import commit
from vllm_vptq.doctor import machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Only cases whose names hold one of these.")] = None,
    cards: Annotated[str | None, typer.Option(help="Only cases of these many GPUs: 1, or 2,4.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write, after every case.")] = None,
    real: Annotated[
        list[str] | None, typer.Option(metavar="VPTQ:DENSE[:DTYPE]", help="A real checkpoint and its dense twin.")
    ] = None,
    per_card: Annotated[int, typer.Option(min=1, help="Engines at a time on a GPU.")] = 6,
    limit: Annotated[float, typer.Option(help="Seconds that an engine may take.")] = 240,
    scratch: Annotated[Path | None, typer.Option(help="Where models and logs go; kept if given.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run what a CPU's engine can do.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Print the names and stop.")] = False,
) -> None:
    """Holds vLLM with VPTQ against vLLM with the dense twin, feature by feature. Exit code 1 if a case failed."""
    reals = [Real(Path(v), Path(d), *t) for v, d, *t in (word.split(":") for word in real or [])]
    chosen = choose(all_cases(reals), names or [], cards)
    if show:
        for case in chosen:
            console.print(f"{case.cards}  {case.name}")
        return
    if problem := unready(chosen, cpu):
        console.print(f"[red]error:[/red] {problem}", soft_wrap=True)
        sys.exit(2)
    gpus = [] if cpu else machine.nvidia_smi()
    usable = 0 if cpu else len(machine.cards())
    head = {
        "date": str(date.today()),
        "gpus": [name for name, _ in gpus],
        "driver": gpus[0][1] if gpus else None,
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers", "vllm-vptq")},
        "commit": commit(),
    }
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        color = {"passed": "green", "FAILED": "red"}.get(row["result"], "dim")
        console.print(
            Text(f"{time.monotonic() - begin:5.0f} s  {row['result']}  {row['name']}: {row['detail']}", color)
        )
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            seconds = round(time.monotonic() - begin, 1)
            out.write_text(json.dumps(head | {"seconds": seconds, "cases": rows}, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="vllm-vptq-engine-") as made:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        found = Runner(scratch or Path(made), usable, per_card, limit).run(chosen, done)
    console.print(table(found))
    failed = sum(row["result"] == "FAILED" for row in found)
    passed = sum(row["result"] == "passed" for row in found)
    skipped = len(found) - passed - failed
    console.print(f"{passed} passed, {failed} failed, {skipped} skipped in {time.monotonic() - begin:.0f} s")
    sys.exit(1 if failed else 0)


def choose(cases: list[Case], names: list[str], cards: str | None) -> list[Case]:
    """The cases asked for."""
    counts = {int(count) for count in cards.split(",")} if cards else None
    return [
        case
        for case in cases
        if (not names or any(name in case.name for name in names)) and (counts is None or case.cards in counts)
    ]


def unready(cases: list[Case], cpu: bool) -> str | None:
    """What is missing on this machine, with the remedy. Builds the CUDA kernels, so that engines need not wait."""
    if not cases:
        return "no case of such a name or number of GPUs; --list shows them"
    if not any(entry.name == "vptq" for entry in metadata.entry_points(group="vllm.general_plugins")):
        return "vLLM will not find the plugin: pip install --no-deps --no-build-isolation -e ."
    if cpu:
        return None
    if not machine.nvidia_smi():
        return "no GPU (nvidia-smi); --cpu runs what a CPU's engine can do"
    build = [sys.executable, "-c", "from vllm_vptq.build import cuda_extension; cuda_extension()"]
    if subprocess.run(build, cwd=ROOT, check=False).returncode:
        return "the CUDA kernels could not be built: vllm-vptq doctor says why"
    return None


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> Table:
    """For people, at the end."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("case", "GPUs", "result", "s", "found"):
        made.add_column(name, justify="right" if name in ("GPUs", "s") else "left", overflow="fold")
    for row in rows:
        color = {"passed": "green", "FAILED": "red"}.get(row["result"], "dim")
        result = Text(row["result"], color)
        made.add_row(row["name"], str(row["cards"]), result, f"{row['seconds']:.0f}", Text(row["detail"]))
    return made


if __name__ == "__main__":
    app()
