"""Tiny layers for compute-sanitizer, one family of kernels a run:   python -m tests.sanitize wide

``scripts/sanitize.sh`` starts it, under memcheck and under racecheck. ``--list`` prints each family, the names of its
kernels and what it runs; ``--build`` compiles the kernels, so that no run under the sanitizer waits for nvcc. Results
are compared on the way: with float64, and the quantizer's with torch's. Exit code 2 without a GPU, 4 where the GPU has
no such kernels.

Nothing here calls cuBLAS's product in 16 bits: under racecheck that kernel ends in an illegal access of its own,
watched or not (an H200, CUDA 13.0). So weights are decoded without the product that follows in a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch

from quantize import native
from quantize.coded import CodedLinear
from quantize.columns import code_block_torch, sweep_block_torch
from quantize.kmeans import Books, assign_torch
from tests.random_coded import LAYERS, random_layer
from tests.test_gpu import DEVICE, EXTRAS, Layer, poison, rms
from vllm_vptq import gpu
from vllm_vptq.build import cuda_extension
from vllm_vptq.format import LayerSpec, parse_format
from vllm_vptq.layouts import choice
from vllm_vptq.layouts.stationary import Gpu

NO_GPU, NO_KERNELS = 2, 4
SMALL_SHARED_BYTES = 99 << 10
"""Of cards without warp groups, on which ``resident.cuh`` serves."""
WEIGHT = 0
"""As a count of tokens: the layer's weight is decoded, and nothing multiplied."""
BOOKS = [(8, 4096, 0), (4, 256, 16), (6, 4096, 256), (8, 16384, 0), (4, 16384, 16)]
"""Vector length, main and residual book of the quantizer's search: a thread block looks through the first three."""

CODED = ("v2", "v7", "v8", "v16", "two books", "no norm", "groups", "outliers")
"""Of ``tests/random_coded.py``."""


@dataclass(frozen=True)
class Case:
    """A fused layer, a module of ``shape`` for each format in ``formats`` (``v2-k256-0+v3-k2048-0``), and its calls."""

    formats: str
    tokens: tuple[int, ...]
    extra: str = "plain"
    layout: str = "stationary"
    shape: tuple[int, int] = (72, 264)

    def specs(self) -> list[LayerSpec | None]:
        """Of its modules."""
        extras = EXTRAS[self.extra]
        rows, columns = self.shape[0], self.shape[1] + extras.get("outlier_size", 0)
        return [LayerSpec(columns, rows, *parse_format(name), **extras) for name in self.formats.split("+")]

    def __str__(self) -> str:
        calls = ", ".join(map(str, self.tokens))
        return f"{self.formats} {self.extra} {self.layout} {self.shape[0]} x {self.shape[1]}, tokens {calls}"


@dataclass(frozen=True)
class Family:
    """Kernels to watch, by parts of their names, and what launches them: layers, or the quantizer.

    ``needs``: a layout that the GPU must have. ``small``: as on a card without warp groups.
    """

    kernels: tuple[str, ...]
    cases: tuple[Case, ...] = ()
    needs: str = "stationary"
    small: bool = False

    def hardware(self) -> Gpu | None:
        """What layers are laid out for, if not for the GPU at hand."""
        return Gpu(Gpu.of(DEVICE).processors, False, SMALL_SHARED_BYTES) if self.small else None

    def __str__(self) -> str:
        return "; ".join(map(str, self.cases)) or f"books {BOOKS}, coded layers {CODED}"


COUNTS = (5, 13, 29, 60, 100)
"""One of each kernel of ``wide.cuh``."""
LISTS = ("v8-k65536-0", "v16-k65536-65536", "v8-k65536-256")
FAMILIES = {
    "wide": Family(
        ("wide_kernel",),
        (
            Case("v2-k256-0", COUNTS),
            Case("v8-k256-256", (1, *COUNTS), "column norm"),
            Case("v6-k4096-0", COUNTS, "groups"),
            Case("v3-k128-0+v4-k512-0+v8-k512-512", COUNTS),
            Case("v8-k65536-0", COUNTS, layout="aligned"),
            Case("v8-k65536-256", COUNTS, "column norm", layout="aligned"),
        ),
        needs="aligned",
    ),
    "sliced": Family(("multiply_kernel",), tuple(Case(name, (5, 8), "column norm") for name in LISTS)),
    "single": Family(("multiply_kernel",), tuple(Case(name, (1,), "column norm") for name in LISTS)),
    "resident": Family(
        ("multiply_kernel",),
        (
            Case("v2-k256-0", (1, 5, 13)),
            Case("v8-k256-256", (1, 5, 13), "column norm"),
            Case("v12-k4096-4096", (1, 5, 13), "groups"),
        ),
        needs="compact",
        small=True,
    ),
    "finish": Family(
        ("finish_kernel", "finish_many_kernel"),
        (
            Case("v8-k65536-0+v8-k256-256", (1, 5, 13, 100), "row norm"),
            Case("v6-k4096-0", (1, 2, 9, 64), "column norm"),
            Case("v8-k65536-0", (1, 2), shape=(8, 20000)),
        ),
    ),
    "prepare": Family(
        ("prepare_kernel",),
        (Case("v8-k256-256", (1, 13, 100), "column norm"), Case("v8-k65536-0", (1, 8, 40), "groups")),
    ),
    "decode": Family(
        ("decode_kernel",),
        tuple(
            Case(name, (WEIGHT,), "column norm")
            for name in ("v2-k256-0", "v8-k256-256", "v6-k4096-0", "v12-k4096-4096", "v8-k65536-0", "v8-k65536-256")
        ),
    ),
    "compact": Family(
        ("compact_kernel", "decode_compact_kernel"),
        (
            Case("v8-k65536-256", (1, 8, 13, WEIGHT), "column norm", layout="compact"),
            Case("v3-k2048-0", (1, 8, 13, WEIGHT), "groups", layout="compact"),
            Case("v8-k256-256", (1, 8, 13, WEIGHT), "outliers", layout="compact"),
        ),
        needs="compact",
    ),
    "packing": Family(
        ("codes_kernel", "count_kernel", "lists_kernel"),
        tuple(Case(name, (1,)) for name in ("v2-k256-0", "v6-k4096-0", "v8-k256-256", *LISTS)),
    ),
    "assign": Family(("search", "leave", "choose", "spread", "code_rows"), needs="compact"),
    "coded": Family(("decode", "pull", "sum_pieces"), needs="compact"),
}


def multiply(family: Family) -> None:
    """Lays its layers out and calls them; AssertionError if a result is wrong."""
    for case in family.cases:
        for dtype in (torch.float16, torch.bfloat16):
            print(case, dtype, flush=True)
            layer = Layer(case.specs(), dtype, case.layout, hardware=family.hardware())
            for count in case.tokens:
                check(layer, count)


def check(layer: Layer, count: int) -> None:
    """A call against float64: not further off than a few roundings of the result's type."""
    if count == WEIGHT:
        exact = layer.weight
        poison(exact.numel(), layer.dtype)
        found = gpu.lookup_weight(**layer.layout.tensors(), plan=layer.plan)
    else:
        x = layer.tokens(count)
        exact = x.double() @ layer.weight.T + layer.bias.double()
        poison(exact.numel(), layer.dtype)
        found = layer(x)
    assert found.shape == exact.shape and found.dtype == layer.dtype
    error, bound = rms(found.double() - exact), 2 * torch.finfo(layer.dtype).eps * rms(exact)
    assert error <= bound, (error, bound)


def search(device: torch.device = DEVICE) -> None:
    """The quantizer's search for centroids: of points, and in a block of columns, which is coded and swept.

    AssertionError if it finds others than torch does.
    """
    for v, k, r in BOOKS:
        print(f"v {v} k {k} r {r}", flush=True)
        books = Books(random(k, v).to(device), random(r, v).to(device) / 3 if r else None)
        points = random(300, v).to(device)
        pairs = (native.assign(points, books.main, books.residual, 4), assign_torch(points, books, 4))
        found, least = ((points - books.decode(*pair)).square().sum(1) for pair in pairs)
        torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-5)
        block, matrix = random(6, 70, v).to(device), (random(6, 6) / 20 + 2 * torch.eye(6)).triu().to(device)
        start = torch.zeros(6, 70, dtype=torch.int64, device=device)
        one, two = ((start.clone(), start.clone() if r else None) for _ in range(2))
        for ours, torchs in ((native.code_block, code_block_torch), (native.sweep_block, sweep_block_torch)):
            result = ours(block, matrix, books.main, books.residual, 4, one)
            with patch("quantize.columns.assign", assign_torch):  # which would take the compiled search
                expected = torchs(block, matrix, books, 4, *two)
            apart = (result - expected).abs().amax((0, 2)) > 1e-3
            for mine, its in zip(one[: 2 if r else 1], two, strict=False):
                apart |= (mine != its).any(0)
            # A vector between two centroids may go either way, and takes those behind it in its row along.
            assert apart.float().mean() < 0.1, f"{ours.__name__}: {int(apart.sum())} of 70 rows are not torch's"


def train(device: torch.device = DEVICE) -> None:
    """Weights of the quantizer's coded layers, and gradients of all they are made of, against torch on a CPU."""
    for name in CODED:
        print(name, flush=True)
        tensors, spec = random_layer(LAYERS[name], 157, 136)
        linear = CodedLinear({key: tensor.to(device) for key, tensor in tensors.items()}, spec, None)
        exact = CodedLinear(tensors, spec, None)
        weight, pulled = exact.weight(), random(157, 136)
        weight.backward(pulled)
        for dtype in (torch.float32, torch.bfloat16):
            torch.testing.assert_close(linear.decoded(dtype).cpu(), weight.to(dtype), rtol=1e-2, atol=1e-5)
        for found, parameter in zip(linear.gradients(pulled.to(device)), exact.trained().values(), strict=True):
            torch.testing.assert_close(found.cpu(), parameter.grad, rtol=1e-4, atol=1e-3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def main(words: Sequence[str]) -> int:
    """The exit code."""
    if list(words) == ["--list"]:
        for name, family in FAMILIES.items():
            print(name, ",".join(family.kernels), family, sep="\t")
        return 0
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use; vllm-vptq doctor says why", file=sys.stderr)
        return NO_GPU
    cuda_extension()
    if not (native.available(DEVICE) and native.decodes(DEVICE)):
        print("error: the quantizer's CUDA libraries could not be built; vllm-vptq doctor says why", file=sys.stderr)
        return 1
    for name in words if list(words) != ["--build"] else ():
        family = FAMILIES[name]
        if family.needs not in ("compact", *choice.available(DEVICE)):
            print(f"this GPU has no {family.needs} layout")
            return NO_KERNELS
        if family.cases:
            multiply(family)
        else:
            {"assign": search, "coded": train}[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
