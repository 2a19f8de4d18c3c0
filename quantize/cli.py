"""The command line: ``vptq-quantize plan | run | eval | dequantize | plot | push``."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape

from quantize.errors import QuantizeError
from quantize.recipe import PRESETS, Recipe
from vllm_vptq.build import BuildError
from vllm_vptq.format import VPTQFormatError
from vllm_vptq.hub import checkpoint_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are defaults and extras, no markup
    help="Makes VPTQ checkpoints (vector post-training quantization, 1.6 to 4 bits a weight) that vLLM serves.",
)
_console = Console(highlight=False)

# What a recipe is made of, for run and plan alike.
_Bits = Annotated[float | None, typer.Option(help="Effective bits a weight, books included; chooses them.")]
_Books = Annotated[
    str | None,
    typer.Option(help="For bits: any; or bytes, pairs of books of 256, the fastest and smallest on a GPU [any]."),
]
_Preset = Annotated[str | None, typer.Option(help=f"{', '.join(PRESETS)}: what the recipe starts from.")]
_File = Annotated[Path | None, typer.Option(help="YAML file; the options below win over it.")]
_VectorLength = Annotated[int | None, typer.Option(help="Output rows that share an index, 2 to 16 [4].")]
_Centroids = Annotated[int | None, typer.Option(help="Main codebook, a power of two up to 65536 [256].")]
_Residual = Annotated[int | None, typer.Option(help="Residual codebook, 0 for none [128].")]
_Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Text file, .jsonl of conversations, datasets NAME[:CONFIG[:SPLIT]], the split being train if none is "
        "given, or self; @WEIGHT for several [self]."
    ),
]
_Tokens = Annotated[
    int | None,
    typer.Option(help="Calibration tokens [16384]; else the preset's, or 8 for every input of the widest layer."),
]
_Context = Annotated[int | None, typer.Option(help="Tokens in a calibration sequence [256].")]
_Steps = Annotated[int | None, typer.Option(help="Training end to end, 0 for none [what the recipe says].")]
_Curvature = Annotated[
    bool | None,
    typer.Option(
        "--curvature/--no-curvature", help="Couple output rows by the end loss's curvature: slower; best does it [no]."
    ),
]
_Seed = Annotated[int | None, typer.Option(help="Same seed, same files [0].")]
_Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto].")]
_Revision = Annotated[str | None, typer.Option(help="The model's branch, tag or commit on the hub [main].")]
_Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that a model brings along, for those that transformers does not know."
    ),
]


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A model on the hub, or a directory with one.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    bits: _Bits = None,
    books: _Books = None,
    preset: _Preset = None,
    recipe: _File = None,
    vector_length: _VectorLength = None,
    centroids: _Centroids = None,
    residual_centroids: _Residual = None,
    calibration: _Calibration = None,
    tokens: _Tokens = None,
    context: _Context = None,
    finetune_steps: _Steps = None,
    curvature: _Curvature = None,
    seed: _Seed = None,
    device: _Device = None,
    ray: Annotated[
        str | None, typer.Option(help="Code layers on a Ray cluster: its address, auto or local (extra ray).")
    ] = None,
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Quantizes the linear layers of a decoder and writes a checkpoint for vLLM.

    A run that was killed goes on where it stopped when it is started again with the same words. Index bits a weight
    are (log2 centroids + log2 residual) / vector length; codebooks and norms come on top, and the plan printed first
    says how much. Examples:

        vptq-quantize run HuggingFaceTB/SmolLM2-135M-Instruct --out smol-vptq --bits 2.5 --preset balanced

        vptq-quantize run ./llama --out llama-2bit --vector-length 8 --centroids 65536 --residual-centroids 0
    """
    from quantize.cluster import Cluster
    from quantize.pipeline import quantize_model
    from quantize.report import Report

    chosen = Recipe.load(
        recipe,
        preset,
        finetune_steps,
        bits=bits,
        books=books,
        vector_length=vector_length,
        centroids=centroids,
        residual_centroids=residual_centroids,
        calibration=calibration or None,
        tokens=tokens,
        context=context,
        curvature=curvature,
        seed=seed,
        device=device,
    )
    cluster = Cluster(ray) if ray else None
    started = time.perf_counter()
    with Report(_console) as report:
        plan = quantize_model(model, out, chosen, report, cluster, trust_remote_code, revision)
    seconds = time.perf_counter() - started
    _console.print(f"{out}: {plan.bits:.2f} effective bits a weight, {seconds:.0f} s. Serve it with:", markup=False)
    _console.print(f"  vllm serve {out}", markup=False)


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Dense or VPTQ checkpoints to compare, directories or on the hub.")
    ],
    text: Annotated[
        str | None, typer.Option(help="A text file, or wikitext2 [the language reference in Python's pydoc].")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens in a window [1024, or the models' positions].", min=2)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.", min=2)] = 40960,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the LM Evaluation Harness (extra eval), by commas: arc_easy,piqa.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What runs the tasks: transformers; or vllm (extra gpu or cpu), which serves the model.")
    ] = "transformers",
    limit: Annotated[int | None, typer.Option(help="Examples of each task [all].")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the results in the VPTQ checkpoints, for the card that push writes.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for what each model says.")
    ] = "float32",
    device: _Device = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Prints the perplexity of each model, its ratio to the first, and its divergence from the first.

    A model that is too large for the GPU visits it block by block. Perplexity and divergence are computed by
    transformers, tasks too unless --engine says vllm. Examples:

        vptq-quantize eval MODEL DIR --text wikitext2 --record

        vptq-quantize eval MODEL DIR --tasks arc_easy,piqa --engine vllm --dtype auto
    """
    from quantize.devices import choose_devices
    from quantize.evaluate import context_of, evaluation_text, load_any, on_device, score, windows_at_once
    from quantize.report import Report
    from quantize.results import add_results, require_checkpoint
    from quantize.tasks import require_harness, served_task_scores, task_scores

    chosen = None if dtype == "auto" else _dtype(dtype, "auto")
    place = choose_devices(device or "auto")[0]
    if record and len(models) == 1:
        raise QuantizeError("--record keeps how a VPTQ checkpoint differs from its original; give that first, then it")
    wanted = tasks.split(",") if tasks else []
    if wanted:
        require_harness(engine)
    elif engine != "transformers":
        raise QuantizeError(f"--engine {engine} is for --tasks; perplexity is computed by transformers")
    body = evaluation_text(text)
    source = "Python's language reference" if text is None else Path(text).name
    for name in models[1:] if record else []:
        require_checkpoint(Path(name))
    window = context_of(models, context, trust_remote_code)
    first: Any = None
    with Report(_console) as report, contextlib.ExitStack() as present:
        served: dict[str, dict[str, float]] = {}
        for name in models if wanted and engine == "vllm" else []:  # now, while the GPU is empty
            report.stage(f"tasks on {name} in vLLM")
            served[name] = served_task_scores(name, wanted, limit, dtype, trust_remote_code)
        model: Any = None
        for name in models:
            model = tokenizer = None  # but for the first, which stays, only one is on the host
            report.stage(f"perplexity of {name}")
            model, tokenizer = load_any(name, torch.device("cpu"), chosen, trust_remote_code)
            reference = None if first is None else first[0]
            with contextlib.ExitStack() as visit:
                whole = (present if first is None else visit).enter_context(on_device(model, place))
                at_once = 1 if whole else windows_at_once(model, window, place)
                found = score(model, tokenizer, body, window, tokens, report.progress, reference, at_once)
                if wanted and engine == "transformers":
                    scores = task_scores(model, tokenizer, wanted, limit, at_once)
                else:
                    scores = {f"{task}, vLLM": value for task, value in served.get(name, {}).items()}
            where = f"on {source}, {found.tokens} tokens in windows of {window}"
            where += "" if dtype == "float32" else f", {str(model.dtype).removeprefix('torch.')}"
            if first is None:
                _console.print(f"  {where}", markup=False)
            measures = {f"perplexity {where}": found.perplexity}
            if found.divergence is not None:
                measures[f"KL to the original {where}"] = found.divergence
            measures |= scores
            first = first or (model, measures, found.perplexity)
            divergence = "" if found.divergence is None else f"  KL {found.divergence:.4f}"
            _console.print(f"  {found.perplexity:.3f}  ({found.perplexity / first[2]:.3f}x){divergence}")
            for task, value in scores.items():
                _console.print(f"  {task}: {value:.4f}", markup=False)
            if record and reference is not None:
                add_results(Path(name), first[1], measures)


def _dtype(name: str, *more: str) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise QuantizeError(f"dtype {name}, expected one of {', '.join([*kinds, *more])}")
    return kinds[name]


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model on the hub, or a directory with one.")],
    bits: _Bits = None,
    books: _Books = None,
    preset: _Preset = None,
    recipe: _File = None,
    vector_length: _VectorLength = None,
    centroids: _Centroids = None,
    residual_centroids: _Residual = None,
    calibration: _Calibration = None,
    tokens: _Tokens = None,
    context: _Context = None,
    finetune_steps: _Steps = None,
    curvature: _Curvature = None,
    seed: _Seed = None,
    device: _Device = None,
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
) -> None:
    """Says what a run would do, without weights or work: layers, bits, bytes, an estimate of time and memory.

    Takes the options of run that make a recipe.
    """
    from quantize.devices import choose_devices
    from quantize.estimate import estimate, planned, table, too_large
    from quantize.model import decoder_blocks, load_shapes
    from quantize.plan import left_dense_note, resident_bits

    chosen = Recipe.load(
        recipe,
        preset,
        finetune_steps,
        bits=bits,
        books=books,
        vector_length=vector_length,
        centroids=centroids,
        residual_centroids=residual_centroids,
        calibration=calibration or None,
        tokens=tokens,
        context=context,
        curvature=curvature,
        seed=seed,
        device=device,
    )
    loaded = load_shapes(model, trust_remote_code, revision)
    made = planned(loaded, chosen)
    _console.print(table(made))
    if left := left_dense_note(decoder_blocks(loaded)):
        _note(left)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        _note("torch finds no GPU here, so whether the model fits the run's is left open")
    elif reason := too_large(loaded, made, chosen, choose_devices(chosen.device)[0]):
        _note(f"a run would stop here: {reason}")
    if chosen.bits is not None and chosen.allocation == "measured":
        _console.print(
            "which layer gets which books is for the run to measure; here all weights count alike", soft_wrap=True
        )
    _console.print(f"{made.bits:.3f} effective bits a weight, {made.weights * made.bits / 8 / 2**20:.1f} MiB")
    sizes = ", ".join(f"{bits:.2f} {layout}" for layout, bits in resident_bits(made.specs).items())
    _console.print(f"bits a weight in a GPU's memory, by layout: {sizes}", soft_wrap=True)
    _console.print(estimate(loaded, made, chosen), markup=False)


@app.command()
def plot(
    report: Annotated[Path, typer.Argument(help="A quantized model's directory, or its vptq_report.jsonl.")],
    out: Annotated[Path, typer.Option(help="Image to write: png, svg or pdf.")] = Path("vptq_report.png"),
) -> None:
    """Draws every layer's bits and error."""
    from quantize.plot import draw

    draw(report, out)
    _console.print(str(out), markup=False)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="A VPTQ checkpoint.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    original: Annotated[str, typer.Option(help="The model it was made from, for the card.")],
    result: Annotated[
        list[str] | None, typer.Option(help="A row of the card's table of results, as NAME=VALUE.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if there is none [main].")] = None,
    public: Annotated[bool, typer.Option(help="Make the repository public.")] = False,
) -> None:
    """Uploads a checkpoint with a model card; private unless you say otherwise."""
    from huggingface_hub import HfApi

    from quantize.push import upload

    url = upload(HfApi(), checkpoint, repository, original, result or [], revision, not public, _note)
    _console.print(url, markup=False)


@app.command()
def dequantize(
    checkpoint: Annotated[str, typer.Argument(help="A VPTQ checkpoint, a directory or on the hub.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist or be empty.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Writes the dense model that a VPTQ checkpoint stands for, for tools that know no VPTQ."""
    from quantize.export import write_dense

    write_dense(checkpoint_folder(checkpoint), out, _dtype(dtype))
    _console.print(str(out), markup=False)


def _note(text: str) -> None:
    _console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)


def main() -> None:
    """Console script: mistakes the user can mend are one line on stderr and exit code 1."""
    # Warnings meant for users of transformers' own API; set it yourself to see them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (QuantizeError, VPTQFormatError, BuildError) as error:
        _refuse(str(error))
    except torch.OutOfMemoryError as error:
        _refuse(f"out of memory: {str(error).splitlines()[0]}")
    except OSError as error:  # a full disk, a folder that cannot be written: errors that name a file and say why
        if error.strerror is None:
            raise
        _refuse(": ".join(str(part) for part in (error.filename, error.strerror) if part))


def _refuse(reason: str) -> NoReturn:
    Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(reason)}", soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
