"""Writes VPTQ checkpoints for the shapes of known models, with random weights and nothing to download.

What they are good for is speed and memory: sizes, books and indices are those of a real checkpoint, the text is noise.
The rivals of a comparison are written too, as configurations for vLLM's ``load_format="dummy"``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from benchmarks.shapes import SHAPES, Shape
from vllm_vptq.format import LayerSpec, VPTQFormatError, parse_format, tensor_shapes

DENSE, W4A16 = "dense", "w4a16"
SHARD_BYTES = 1 << 30
"""Tensors collected before a file is written. Each thread holds about twice this at most."""
THREADS = min(os.cpu_count() or 1, 16)
DENSE_STD = 0.02
"""Of embeddings, head and biases."""
OUTLIER_VECTOR, OUTLIER_CENTROIDS = 4, 4096
"""Of the book for outlier columns."""
NORM_DEVIATIONS = 4.0
"""A norm maps a weight column from this many standard deviations either side of zero to [0, 1]."""


def synthesize(
    out: Path,
    model: str,
    format_name: str,
    *,
    perm: bool = False,
    norm: bool = True,
    groups: int = 1,
    outliers: float = 0.0,
    layers: int | None = None,
    dtype: str = "float16",
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Writes the checkpoint of ``model`` (a key of SHAPES) in ``format_name`` to ``out``, which must be new or empty.

    ``format_name`` is ``vV-kK-R``, or ``dense`` or ``w4a16`` for a configuration without weights. ``perm`` and ``norm``
    store columns permuted and scaled; ``groups`` have a book each, and ``outliers`` percent of the columns one of their
    own, as checkpoints of research have them. ``layers`` cuts the depth. ``dtype``, of books and dense tensors, is
    ``float16`` or ``bfloat16``. Equal arguments give equal files. Returns ``out``; VPTQFormatError for an argument it
    cannot use.
    """
    if model not in SHAPES:
        raise VPTQFormatError(f"model {model}", f"expected one of {', '.join(SHAPES)}")
    if dtype not in ("float16", "bfloat16"):
        raise VPTQFormatError(f"dtype {dtype}", "expected float16 or bfloat16")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VPTQFormatError(str(out), "exists and is not empty; choose another directory or remove it")
    shape = SHAPES[model].cut(layers)
    config = shape.config(dtype)
    specs: dict[str, LayerSpec] = {}
    if format_name == W4A16:
        config["quantization_config"] = _w4a16_section()
    elif format_name != DENSE:
        specs = _specs(shape, format_name, perm, norm, groups, outliers)
        # Generation F1 of the configuration, the one of the public Llama-3.1 checkpoints.
        section = {name: spec.to_config() for name, spec in specs.items()}
        config["quantization_config"] = {"quant_method": "vptq", "config_for_layers": section}
    out.mkdir(parents=True, exist_ok=True)
    if specs:
        _write_weights(out, shape, specs, getattr(torch, dtype), seed, console or Console(stderr=True))
    write_tokenizer(out, shape.vocabulary)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return out


def _specs(
    shape: Shape, format_name: str, perm: bool, norm: bool, groups: int, outliers: float
) -> dict[str, LayerSpec]:
    v, k, r = parse_format(format_name)
    book = (OUTLIER_VECTOR, OUTLIER_CENTROIDS) if outliers else (0, 0)

    def spec(outputs: int, inputs: int) -> LayerSpec:
        count = math.ceil(inputs * outliers / 100)
        if count:
            count += (inputs - count) % groups  # as the reference does it, so that the groups are of one size
        made = LayerSpec(None, None, v, k, r, groups, count, *book, enable_perm=perm, enable_norm=norm)
        return made.with_shape(outputs, inputs, f"{format_name} in {groups} groups")

    return {
        f"model.layers.{layer}.{name}": spec(*sizes)
        for layer in range(shape.layers)
        for name, sizes in shape.linears().items()
    }


def _w4a16_section() -> dict[str, Any]:
    """Four-bit integers in groups of 128, as llm-compressor writes them."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


# ---------------------------------------------------------------------------------------------------------------
# Tensors


def _generator(seed: int, name: str) -> np.random.Generator:
    """Each tensor's own, so that it does not depend on which others are written."""
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


def _normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, gen: np.random.Generator) -> Tensor:
    values = torch.empty(shape, dtype=dtype)
    for part in values.flatten().split(1 << 24):  # float32 for a part at a time
        part.copy_(torch.from_numpy(gen.standard_normal(part.numel(), dtype=np.float32)).mul_(std))
    return values


def module_tensors(spec: LayerSpec, dtype: torch.dtype, gen: np.random.Generator) -> dict[str, Tensor]:
    """One module's tensors, as if k-means had coded a Gaussian weight of standard deviation ``1 / sqrt(in_features)``.

    A book of k vectors of length v leaves a share ``k ** (-2 / v)`` of the variance (the bound of rate-distortion
    theory), which the residual book has. All indices are equally likely; those of a trained book are nearly so.
    """
    _, inputs = spec.shape
    std = inputs**-0.5
    shapes = tensor_shapes(spec)
    left = spec.num_centroids ** (-2 / spec.vector_len) if spec.num_res_centroids else 0.0
    # With a norm the books stand for values in [0, 1], which the norm stretches over the weights.
    unit = 1 / (2 * NORM_DEVIATIONS) if spec.enable_norm else std
    centroids = _normal(shapes["centroids.weight"], unit * (1 - left) ** 0.5, dtype, gen)
    tensors = {"centroids.weight": centroids.add_(0.5) if spec.enable_norm else centroids}
    if spec.num_res_centroids:
        tensors["res_centroids.weight"] = _normal(shapes["res_centroids.weight"], unit * left**0.5, dtype, gen)
    tensors["indices"] = _random_stream(shapes["indices"], spec.group_size * spec.total_bits, gen)
    if spec.enable_norm:
        reach = torch.from_numpy(gen.uniform(0.8, 1.2, inputs)) * std * NORM_DEVIATIONS
        tensors |= {"weight_scale": (2 * reach).to(dtype), "weight_bias": (-reach).to(dtype)}
    if spec.enable_perm:
        tensors["perm"] = torch.from_numpy(gen.permutation(inputs).astype(np.uint16).view(np.int16))
    if spec.outlier_size:
        book = _normal(shapes["outlier_centroids.weight"], unit, dtype, gen)
        tensors["outlier_centroids.weight"] = book.add_(0.5) if spec.enable_norm else book
        chosen = gen.integers(0, spec.num_outlier_centroids, shapes["outlier_indices"])
        tensors["outlier_indices"] = torch.from_numpy(chosen.astype(np.uint16).view(np.int16))
    return tensors


def _random_stream(shape: tuple[int, ...], bits: int, gen: np.random.Generator) -> Tensor:
    """Rows of ``bits`` random bits each: every sequence of bits is one of indices below a power of two."""
    count = int(np.prod(shape))
    # All of 64 bits: numpy then takes what the generator gives, without the interpreter's lock.
    raw = gen.integers(0, 1 << 64, (count + 1) // 2, dtype=np.uint64)
    words = raw.view(np.uint32)[:count].reshape(shape)
    if bits % 32:
        words[..., -1] &= np.uint32((1 << bits % 32) - 1)
    return torch.from_numpy(words.view(np.int32))


@dataclass(frozen=True)
class _Part:
    """A part of a checkpoint: its name for people, its size (but for norms and biases), and what makes its tensors."""

    name: str
    nbytes: int
    make: Callable[[], dict[str, Tensor]]


def _parts(shape: Shape, specs: dict[str, LayerSpec], dtype: torch.dtype, seed: int) -> list[_Part]:
    """All of a checkpoint, in order."""
    widths = {"indices": 4, "outlier_indices": 2, "perm": 2}
    ones = torch.ones(shape.hidden, dtype=dtype)

    def dense(name: str, *sizes: int) -> dict[str, Tensor]:
        return {name: _normal(sizes, DENSE_STD, dtype, _generator(seed, name))}

    def vocabulary(name: str) -> dict[str, Tensor]:
        return dense(name, shape.vocabulary, shape.hidden)

    def layer(index: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        for name, (outputs, _) in shape.linears().items():
            module = prefix + name
            made = module_tensors(specs[module], dtype, _generator(seed, module))
            tensors |= {f"{module}.{key}": tensor for key, tensor in made.items()}
            if shape.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                tensors |= dense(f"{module}.bias", outputs)
        return tensors

    words = shape.vocabulary * shape.hidden * dtype.itemsize
    coded = sum(
        int(np.prod(sizes)) * widths.get(key, dtype.itemsize)
        for name in shape.linears()
        for key, sizes in tensor_shapes(specs[f"model.layers.0.{name}"]).items()
    )
    return [
        _Part("embedding", words, lambda: vocabulary("model.embed_tokens.weight")),
        *(_Part(f"layer {i + 1} of {shape.layers}", coded, partial(layer, i)) for i in range(shape.layers)),
        _Part("head", words, lambda: {"model.norm.weight": ones} | vocabulary("lm_head.weight")),
    ]


# ---------------------------------------------------------------------------------------------------------------
# Files


def _write_weights(
    out: Path, shape: Shape, specs: dict[str, LayerSpec], dtype: torch.dtype, seed: int, console: Console
) -> None:
    parts = _parts(shape, specs, dtype, seed)
    shards: list[list[_Part]] = [[]]
    for part in parts:
        if sum(other.nbytes for other in shards[-1]) >= SHARD_BYTES:
            shards.append([])
        shards[-1].append(part)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    total, lock = 0, threading.Lock()

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        task = progress.add_task("", total=sum(part.nbytes for part in parts))

        def write(i: int) -> None:
            nonlocal total
            tensors: dict[str, Tensor] = {}
            for part in shards[i]:
                tensors |= part.make()
                progress.update(task, description=part.name, advance=part.nbytes)
            save_file(tensors, out / files[i], metadata={"format": "pt"})
            with lock:
                weight_map.update(dict.fromkeys(tensors, files[i]))
                total += sum(tensor.nbytes for tensor in tensors.values())

        # Normal numbers take longest: first those files that have most of them, the embedding's and the head's.
        order = sorted(range(len(shards)), key=lambda i: i not in (0, len(shards) - 1))
        for done in [pool.submit(write, i) for i in order]:
            done.result()
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_tokenizer(out: Path, size: int) -> None:
    """A tokenizer of ``size`` words ``w3``, ``w4``, ...: any token ids decode to text that encodes to the same ids.

    vLLM's server and benchmarks need one. Words it does not know are ``<unk>``, so it accepts any text.
    """
    specials = ["<unk>", "<s>", "</s>"]
    words = specials + [f"w{i}" for i in range(len(specials), size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# Command line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help=f"Whose shapes: {', '.join(SHAPES)}.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    format_name: Annotated[
        str, typer.Option("--format", metavar="vV-kK-R|dense|w4a16", help="Vector length, centroids, residual ones.")
    ] = "v8-k65536-0",
    perm: Annotated[bool, typer.Option("--perm", help="Store columns permuted, as older public files do.")] = False,
    norm: Annotated[bool, typer.Option(help="Scale and shift every input column, as public files do.")] = True,
    groups: Annotated[int, typer.Option(min=1, help="Groups of columns with a book each.")] = 1,
    outliers: Annotated[float, typer.Option(min=0, max=50, help="Percent of columns with a book of their own.")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the model to this many layers.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 0,
) -> None:
    """Writes a VPTQ checkpoint with random weights for the shapes of a known model, and a tokenizer to go with it.

    Formats dense and w4a16 (4 bits, groups of 128) write only a configuration, which vLLM fills with random weights:
    vllm serve OUT --load-format dummy. Examples:

        python -m benchmarks.synthesize Llama-3.1-8B llama-v8 --format v8-k65536-0

        python -m benchmarks.synthesize Qwen2.5-72B qwen-perm --format v16-k65536-65536 --perm --dtype bfloat16

        python -m benchmarks.synthesize Llama-3.1-8B llama-dense --format dense
    """
    try:
        synthesize(
            out, model, format_name, perm=perm, norm=norm, groups=groups, outliers=outliers, layers=layers, dtype=dtype,
            seed=seed,
        )  # fmt: skip
    except (VPTQFormatError, OSError) as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    size = sum(file.stat().st_size for file in out.iterdir())
    typer.echo(f"{out}: {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    app()
