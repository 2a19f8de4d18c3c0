"""What books of each size leave of real layers, beside what ``quantize/allocate.py`` expects of them.

    python -m benchmarks.books MODEL TEXT [--preset fast] [--tokens 16384] [--layers 6]

Some linears of a model are coded with every kind of books, on second moments of the original model, as ``fast`` codes
them, or ``paper``, whose pairs are chosen greedily. A table says, in dB of the layer's loss, how far each kind is from
what is expected, beside v3-k256 in the same layer, so that only differences between kinds count; the mean over the
layers is what ``_ON_WEIGHTS`` holds once what few vectors a centroid bring (``_FITTING``, fitted along) is taken off.
Rows go to ``benchmarks/results/books-DATE-MODEL[-paper].json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.record import RESULTS
from quantize.allocate import distortion, expected_error
from quantize.hessian import SecondMoment
from quantize.model import decoder_blocks
from quantize.recipe import Recipe
from quantize.solver import solve

KINDS = [
    (2, 16, 0), (2, 32, 0), (2, 64, 0), (2, 128, 0), (2, 256, 0),
    (3, 64, 0), (3, 128, 0), (3, 256, 0), (3, 512, 0), (3, 1024, 0), (3, 2048, 0),
    (4, 256, 0), (4, 512, 0), (4, 1024, 0), (4, 4096, 0), (5, 1024, 0), (5, 4096, 0), (6, 4096, 0),
    (4, 64, 32), (4, 64, 64), (4, 256, 16), (4, 256, 64), (4, 256, 256), (6, 256, 64), (6, 1024, 64), (6, 256, 256),
    (3, 256, 256), (5, 256, 256), (8, 512, 64), (8, 256, 256), (8, 512, 512),
]  # fmt: skip
REFERENCE = (3, 256, 0)
LEAST_VECTORS = 8
"""A centroid must have on average, or books learn their layer by heart."""


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--preset", choices=["fast", "paper"], default="fast")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: arguments.tokens // 256 * 256].view(-1, 256)
    linears = some_linears(model, arguments.layers)
    moments = second_moments(model, linears, ids)
    jobs = [(name, kind) for name in linears for kind in KINDS]
    rows = []
    for name, (v, k, r) in track(jobs, "coding"):
        weight = linears[name].weight.detach()
        if max(k, r) * LEAST_VECTORS > weight.numel() / v:
            continue
        recipe = Recipe.load(None, arguments.preset, vector_length=v, centroids=k, residual_centroids=r)
        error = solve(weight.clone(), moments[name].clone(), recipe, recipe, torch.float16).error
        shape = dict(out_features=weight.shape[0], in_features=weight.shape[1])
        rows.append(dict(layer=name, **shape, v=v, k=k, r=r, error=float(f"{error:.4g}")))
    about = {
        "model": Path(arguments.model).name,
        "text": arguments.text.name,
        "tokens": ids.numel(),
        "preset": arguments.preset,
    }
    name = [about["model"], *[arguments.preset] * (arguments.preset != "fast")]
    out = RESULTS / f"books-{date.today()}-{'-'.join(name)}.json"
    out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    power, offsets = fit(rows)
    show(rows, offsets, arguments.preset == "paper")
    print(f"power of the share of vectors beyond the centroids: {power:.2f}\n{out}")


def some_linears(model: nn.Module, count: int) -> dict[str, nn.Linear]:
    """Three of a block: attention's last and two of the MLP; of early and late blocks, ``count`` in all."""
    blocks = list(decoder_blocks(model))
    names = ("o_proj", "up_proj", "down_proj")
    picked = [len(blocks) // 5, len(blocks) - 3, len(blocks) // 2, 1][: -(-count // len(names))]
    found = {
        f"{i}.{name}": linear for i in picked for name, linear in blocks[i].linears.items() if name.endswith(names)
    }
    return dict(list(found.items())[:count])


@torch.no_grad()
def second_moments(model: nn.Module, linears: dict[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    """``E[x x^T]`` float32 ``[in_features, in_features]`` of each linear's input, by the original model."""
    moments = {name: SecondMoment(linear.in_features, linear.weight.device) for name, linear in linears.items()}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, moment=moments[name]: moment.add(args[0]))
        for name, linear in linears.items()
    ]
    for batch in ids.split(8):
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: moment.mean() for name, moment in moments.items()}


def vectors(row: dict[str, Any]) -> float:
    """Of a row's layer."""
    return row["out_features"] * row["in_features"] / row["v"]


def gaussian(v: int, k: int, r: int, vectors: float) -> float:
    """The error of books on a Gaussian source, which no count of vectors matters to."""
    return distortion(v, k, r)


def decibels(rows: list[dict[str, Any]], expected: Callable[[int, int, int, float], float]) -> list[float]:
    """Of every row's error over ``expected(v, k, r, vectors)``, beside the same of REFERENCE in its layer."""

    def ratio(row: dict[str, Any]) -> float:
        return 10 * math.log10(row["error"] / expected(row["v"], row["k"], row["r"], vectors(row)))

    reference = {row["layer"]: ratio(row) for row in rows if (row["v"], row["k"], row["r"]) == REFERENCE}
    return [ratio(row) - reference[row["layer"]] for row in rows]


def fit(rows: list[dict[str, Any]]) -> tuple[float, dict[tuple[int, int, int], float]]:
    """The power of ``1 - (k + r) / vectors`` that the errors follow, and every kind's dB beside it.

    Least squares, with a level and a slope over the bits for every layer, whose mean slope is that of the kinds.
    """
    kinds = list(dict.fromkeys((row["v"], row["k"], row["r"]) for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    levels, slopes = len(kinds), len(kinds) + len(layers)
    matrix = np.zeros((len(rows) + 2, slopes + len(layers) + 1))
    for line, row in zip(matrix, rows, strict=False):
        v, k, r = row["v"], row["k"], row["r"]
        line[kinds.index((v, k, r))] = line[levels + layers.index(row["layer"])] = 1
        line[slopes + layers.index(row["layer"])] = math.log2(k * max(r, 1)) / v - 8 / 3
        line[-1] = 10 * math.log10(1 - (k + r) / vectors(row))
    matrix[-2, kinds.index(REFERENCE)] = 100  # is 0
    matrix[-1, slopes:-1] = 100
    values = [*decibels(rows, gaussian), 0.0, 0.0]
    solution = np.linalg.lstsq(matrix, np.array(values), rcond=None)[0]
    return float(solution[-1]), dict(zip(kinds, solution.tolist(), strict=False))


def show(rows: list[dict[str, Any]], offsets: dict[tuple[int, int, int], float], greedy: bool) -> None:
    """A line for every kind: from Gaussian books, from what ``allocate`` expects, and what the fit makes of it."""
    table = Table(box=None, header_style="bold")
    for name in ("books", "layers", "dB from Gaussian", "from expected", "fitted"):
        table.add_column(name, justify="left" if name == "books" else "right")
    plain = decibels(rows, gaussian)
    expected = decibels(rows, partial(expected_error, greedy=greedy))
    for kind, offset in offsets.items():
        own = [i for i, row in enumerate(rows) if (row["v"], row["k"], row["r"]) == kind]
        means = (sum(values[i] for i in own) / len(own) for values in (plain, expected))
        v, k, r = kind
        table.add_row(f"v{v}-k{k}-{r}", str(len(own)), *(f"{mean:+.2f}" for mean in means), f"{offset:+.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
