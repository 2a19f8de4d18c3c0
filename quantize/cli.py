"""The command line: ``vptq-quantize run | eval | dequantize``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from quantize.errors import QuantizeError
from quantize.recipe import Recipe
from vllm_vptq.build import BuildError
from vllm_vptq.format import VPTQFormatError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes VPTQ checkpoints (vector post-training quantization, 1.6 to 4 bits a weight) that vLLM serves.",
)
_console = Console(highlight=False)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A model on the hub, or a directory with one.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file; the options below win over it.")] = None,
    vector_length: Annotated[int | None, typer.Option(help="Output rows that share an index, 2 to 16 [4].")] = None,
    centroids: Annotated[int | None, typer.Option(help="Main codebook, a power of two up to 65536 [256].")] = None,
    residual_centroids: Annotated[int | None, typer.Option(help="Residual codebook, 0 for none [128].")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file or datasets NAME[:CONFIG] [text the model writes itself]."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens [16384].")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a calibration sequence [256].")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same files [0].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto].")] = None,
) -> None:
    """Quantizes the linear layers of a decoder and writes a checkpoint for vLLM.

    Index bits a weight are (log2 centroids + log2 residual) / vector length; codebooks and norms come on top, and the
    plan printed first says how much. Examples:

        vptq-quantize run HuggingFaceTB/SmolLM2-135M-Instruct --out smol-vptq

        vptq-quantize run ./llama --out llama-2bit --vector-length 8 --centroids 65536 --residual-centroids 0
    """
    from quantize.pipeline import quantize_model
    from quantize.report import Report

    options: dict[str, Any] = {
        "vector_length": vector_length,
        "centroids": centroids,
        "residual_centroids": residual_centroids,
        "calibration": calibration,
        "tokens": tokens,
        "context": context,
        "seed": seed,
        "device": device,
    }
    started = time.perf_counter()
    with Report(_console) as report:
        plan = quantize_model(model, out, Recipe.load(recipe, **options), report)
    seconds = time.perf_counter() - started
    _console.print(f"{out}: {plan.bits:.2f} effective bits a weight, {seconds:.0f} s. Serve it with:", markup=False)
    _console.print(f"  vllm serve {out}", markup=False)


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Dense or VPTQ checkpoints, to compare.")],
    text: Annotated[
        str | None, typer.Option(help="A text file, or wikitext2 [the language reference in Python's pydoc].")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.", min=2)] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.", min=2)] = 40960,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Prints the perplexity of each model, in float32, and its ratio to the first."""
    from quantize.evaluate import evaluation_text, load_any, perplexity
    from quantize.report import Report

    body = evaluation_text(text)
    first: float | None = None
    with Report(_console) as report:
        for name in models:
            report.stage(f"perplexity of {name}")
            model, tokenizer = load_any(name, torch.device(device))
            value = perplexity(model, tokenizer, body, context, tokens, report.progress)
            first = first or value
            _console.print(f"  {value:.3f}  ({value / first:.3f}x)")


@app.command()
def dequantize(
    checkpoint: Annotated[Path, typer.Argument(help="A VPTQ checkpoint.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Writes the dense model that a VPTQ checkpoint stands for, for tools that know no VPTQ."""
    from quantize.export import write_dense

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise QuantizeError(f"dtype {dtype}, expected one of {', '.join(kinds)}")
    write_dense(checkpoint, out, kinds[dtype])
    _console.print(str(out), markup=False)


def main() -> None:
    """Console script: mistakes the user can mend are one line on stderr and exit code 1."""
    # Warnings meant for users of transformers' own API; set it yourself to see them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (QuantizeError, VPTQFormatError, BuildError) as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
