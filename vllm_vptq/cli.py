"""The command line of serving: ``vllm-vptq doctor | inspect | bench``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vllm_vptq.bench.settings import BenchError, Settings
from vllm_vptq.build import BuildError
from vllm_vptq.doctor.fact import Report
from vllm_vptq.hub import checkpoint_folder
from vllm_vptq.specs import VPTQFormatError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are defaults and extras, no markup
)
_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}


def _show_version(asked: bool) -> None:
    if asked:
        from vllm_vptq.doctor.software import version

        typer.echo(f"vllm-vptq {version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Serves VPTQ models (vector post-training quantization, 1.6 to 4 bits a weight) with vLLM."""


@app.command()
def doctor(
    build: Annotated[bool, typer.Option("--build", help="Build the native libraries that are missing, now.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Tells what would serve a VPTQ model on this machine, what is missing, and how to get it.

    Exit code 0 if something here can serve with native kernels, 1 if not.

    Kernels get built in one of two ways. When installing, where torch with CUDA and nvcc are at hand: pip install
    --no-build-isolation . Or at first use, for the GPUs present, into a cache: start with --build, and the first model
    does not wait for the compiler. Examples:

        vllm-vptq doctor

        vllm-vptq doctor --build

        vllm-vptq doctor --json | jq .verdicts
    """
    from vllm_vptq.doctor import examine

    if build:
        _build()
    report = examine()
    if as_json:
        # Not the console's: it wraps lines.
        typer.echo(json.dumps({**dataclasses.asdict(report), "serves": report.serves}, indent=2, ensure_ascii=False))
    else:
        _print(report)
    raise typer.Exit(0 if report.serves else 1)


def _build() -> None:
    from vllm_vptq.doctor import machine, native

    # On stderr, to leave stdout to the report.
    console = Console(stderr=True, highlight=False)
    for name, job in native.to_build(with_gpu=bool(machine.gpus())):
        started = time.perf_counter()
        with console.status(f"building {name}"):
            job()
        console.print(f"built {name} in {time.perf_counter() - started:.0f} s")


def _print(report: Report) -> None:
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for fact in report.facts:
        table.add_row(Text(*_MARKS[fact.fine]), fact.name, _with_remedies(fact.value, (fact.remedy,)))
    table.add_row()
    for verdict in report.verdicts:
        mark, device = Text(*_MARKS[verdict.serves]), Text(verdict.device, "bold")
        table.add_row(mark, device, _with_remedies(verdict.text, verdict.remedies))
    console.print(table)


def _with_remedies(text: str, remedies: tuple[str, ...]) -> Text:
    """Not markup: paths and names of extras hold brackets."""
    return Text("\n").join([Text(text), *(Text(f"→ {remedy}", "yellow") for remedy in remedies if remedy)])


@app.command(name="inspect")
def inspect_(
    checkpoint: Annotated[
        str, typer.Argument(metavar="DIR", help="A directory with a VPTQ checkpoint, or OWNER/NAME on the hub.")
    ],
    every: Annotated[bool, typer.Option("--all", help="A row for every module, not for every kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Describes a checkpoint: formats, bits a weight, sizes, and the tensor parallel degrees it admits.

    Reads the configuration and the headers of the weight files, so it takes seconds whatever the size. A degree that
    is not admitted comes with the reason; the same rules refuse it when the model loads. Examples:

        vllm-vptq inspect ./llama-vptq

        vllm-vptq inspect ./llama-vptq --json | jq .effective_bits
    """
    from vllm_vptq.inspection import inspect_checkpoint, table

    found = inspect_checkpoint(checkpoint_folder(checkpoint))
    if as_json:
        typer.echo(json.dumps(table.as_json(found), indent=2))
    else:
        table.show(found, Console(highlight=False), every)


@app.command()
def bench(
    checkpoints: Annotated[list[Path] | None, typer.Argument(metavar="DIR...", help="VPTQ checkpoints.")] = None,
    dense: Annotated[Path | None, typer.Option(help="The model in 16 bits; only its config.json is read.")] = None,
    w4a16: Annotated[
        Path | None, typer.Option(help="A compressed-tensors model; only its config.json is read.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree, of all models.")] = Settings.tp,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences decoded at once.")] = "1,8,32,64",
    input_tokens: Annotated[int, typer.Option(min=1, help="Prompt of each of them.")] = Settings.input_tokens,
    steps: Annotated[int, typer.Option(min=2, help="Tokens each of them generates.")] = Settings.steps,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Prompt whose first token is timed; 0 for none.")
    ] = Settings.prompt_tokens,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = Settings.repeats,
    dtype: Annotated[str, typer.Option(help="Of activations, as vLLM takes it.")] = Settings.dtype,
    max_model_len: Annotated[int | None, typer.Option(help="As vLLM takes it (what the lengths need).")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="As vLLM takes it.")] = Settings.gpu_memory_utilization,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="As vLLM takes it: starts sooner.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON to write or to continue (benchmarks/results/serving-DATE-GPU.json).")
    ] = None,
) -> None:
    """Compares models in vLLM: tokens per second, time to the first token, memory of the weights, room for the cache.

    Each model runs in a process of its own. The rivals (--dense, --w4a16) get random weights, so a config.json is all
    they need. Results are written after every figure, and a file of the same settings is continued. Examples:

        python -m benchmarks.synthesize Llama-3.1-8B llama-v8 --format v8-k65536-0

        python -m benchmarks.synthesize Llama-3.1-8B llama-fp16 --format dense

        vllm-vptq bench llama-v8 --dense llama-fp16 --batches 1,8
    """
    from vllm_vptq.bench import comparison
    from vllm_vptq.bench.settings import contestants

    settings = Settings(
        tp, _counts(batches), input_tokens, steps, prompt_tokens, repeats, dtype, max_model_len,
        gpu_memory_utilization, enforce_eager,
    )  # fmt: skip
    complete = comparison.run(contestants(checkpoints or [], dense, w4a16), settings, out, Console(highlight=False))
    raise typer.Exit(0 if complete else 1)


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(sorted({int(word) for word in text.split(",") if word.isdecimal() and int(word) > 0}))
    if len(counts) != len(text.split(",")):
        raise BenchError(f"--batches {text}: expected different positive numbers with commas, for example 1,8,32")
    return counts


def main() -> None:
    """Console script: mistakes the user can mend are one line on stderr and exit code 1."""
    try:
        app()
    except (BenchError, BuildError, VPTQFormatError) as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
