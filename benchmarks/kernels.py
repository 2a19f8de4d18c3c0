"""Times the CUDA kernels against cuBLAS on the linear layers of Llama-3.1-8B and 70B, fused as vLLM runs them.

    python -m benchmarks.kernels                       # the whole table, some minutes
    python -m benchmarks.kernels --formats v8-k65536 --shapes 8192x8192 --tokens 1 8
    python -m benchmarks.kernels --direct 64           # weights looked up, not decoded, up to 64 tokens
    python -m benchmarks.kernels --norm                # as nearly all public checkpoints are
    python -m benchmarks.kernels --norm --groups 4     # columns in groups that a permutation has scattered

Every measurement is a CUDA graph of many calls that rotate among copies of the layer larger together than the L2
cache, so weights come from memory, as in a model; the time of a call is that of the graph over the calls. The dense
product is measured in the same way, in the same run. Medians of several replays.

``% mem`` and ``% gather``: how much of the memory's and of the shared memory's bandwidth the least work of the call
would take in that time (limits.py). Rows are added to benchmarks/results/kernels-DATE-GPU.json, unless --direct is
given, or to --out.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.limits import Limits, Work
from vllm_vptq import reference
from vllm_vptq.bench import checkout
from vllm_vptq.build import cuda_extension
from vllm_vptq.format import VPTQFormatError, parse_format
from vllm_vptq.layouts import choice, compact, memory
from vllm_vptq.parameters import ModuleShard, Segment

FORMATS = [
    "v8-k65536", "v8-k65536-256", "v16-k65536-65536", "v8-k256-256", "v6-k4096", "v12-k4096-4096", "v8-k65536-65536",
]  # fmt: skip
SHAPES = {
    "8B qkv": ([4096, 1024, 1024], 4096),
    "8B o": ([4096], 4096),
    "8B gate_up": ([14336, 14336], 4096),
    "8B down": ([4096], 14336),
    "70B qkv": ([8192, 1024, 1024], 8192),
    "70B o": ([8192], 8192),
    "70B gate_up": ([28672, 28672], 8192),
    "70B down": ([8192], 28672),
}
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
KEY = ("format", "layer", "tokens", "dtype", "norm", "groups", "layout")
"""What makes two rows rows of the same measurement."""
CHECKED_TOKENS = 64
Rows = record.Rows
COLD_BYTES = 200 << 20
"""Weights that a graph rotates among: several times the L2 cache."""


@dataclass
class Layer:
    """A layer in one layout, whose weights are looked up for up to ``direct`` tokens; ``copies`` of its tensors, that
    none is found in a cache."""

    layout: choice.LayerLayout
    direct: int
    copies: list[dict[str, Tensor | None]]
    bits: float

    def __call__(self, x: Tensor, copy: int = 0) -> Tensor:
        return self.layout.apply(x, None, **self.copies[copy % len(self.copies)])


def random_shard(
    v: int,
    k: int,
    r: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    gen: torch.Generator,
    norm: bool = False,
    groups: int = 1,
) -> ModuleShard:
    """A module with random books and indices, all equally likely, on the generator's device.

    ``norm``: one over columns. ``groups`` of columns have books of their own; a permutation decides which is in which.
    With one group a permutation leaves no trace in a shard (see ``parameters``), so none is made.
    """
    device = gen.device
    bits, res_bits, rows = int(math.log2(k)), int(math.log2(r)) if r else 0, -(-out_features // v)
    order = torch.randperm(in_features, generator=gen, device=device).chunk(groups)
    segments = []
    for columns in order:
        words = -(-columns.numel() * (bits + res_bits) // 32)
        stream = torch.randint(-(1 << 31), 1 << 31, (rows, words), generator=gen, device=device, dtype=torch.int64)
        book = (torch.randn(k, v, generator=gen, device=device) * 0.02).to(dtype)
        residual = (torch.randn(r, v, generator=gen, device=device) * 0.005).to(dtype) if r else None
        listed = None if groups == 1 else columns.sort().values.to(torch.int32)
        segments.append(Segment(v, bits, res_bits, columns.numel(), 0, stream.to(torch.int32), listed, book, residual))
    scale = shift = None
    if norm:
        scale = (0.5 + torch.rand(in_features, generator=gen, device=device)).to(dtype)
        shift = (torch.randn(in_features, generator=gen, device=device) * 0.002).to(dtype)
    return ModuleShard(out_features, in_features, tuple(segments), scale, shift)


def build(shards: list[ModuleShard], dtype: torch.dtype, layout: str, direct_tokens: int | None = None) -> Layer:
    """Lays shards out; ``direct_tokens`` overrules the measured crossover."""
    device = torch.device("cuda")
    direct = choice.crossover(device, layout, shards) if direct_tokens is None else direct_tokens
    made, tensors = choice.lay_out(layout, shards, dtype, device, direct)
    size = sum(t.numel() * t.element_size() for t in tensors.values() if t is not None)
    copies = [tensors]
    for _ in range(min(40, COLD_BYTES // size + 1)):
        copies.append({name: None if t is None else t.clone() for name, t in tensors.items()})
    return Layer(made, direct, copies, size * 8 / made.weights)


@cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps memory for every stream."""
    return torch.cuda.Stream()


def microseconds(call: Callable[[int], Tensor], copies: int, replays: int = 7) -> float:
    """Time of one call of a CUDA graph that makes ``call(i)`` for many i; median of the replays."""
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call(0)
    end.record()
    torch.cuda.synchronize()
    # About 10 ms a replay, and every copy at least once.
    calls = max(min(copies, 40), min(200, int(10 / max(begin.elapsed_time(end), 1e-2))))
    # Not by torch.cuda.graph, which collects garbage and empties the cache first: longer than measuring takes.
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for i in range(calls):
            call(i)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    times = []
    for _ in range(replays):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


def dense_microseconds(out_features: int, in_features: int, tokens: int, dtype: torch.dtype) -> float:
    copies = max(2, COLD_BYTES // (out_features * in_features * 2) + 1)
    weights = [(torch.randn(out_features, in_features, device="cuda") * 0.02).to(dtype) for _ in range(copies)]
    x = torch.randn(tokens, in_features, device="cuda").to(dtype)
    return microseconds(lambda i: torch.nn.functional.linear(x, weights[i % copies]), copies)


def relative_error(layer: Layer, shards: list[ModuleShard], dtype: torch.dtype, tokens: int) -> float:
    """Of the first outputs of the first CHECKED_TOKENS against the torch implementation in float64.

    All tokens are computed, for which kernels serve a call depends on how many there are.
    """
    x = torch.randn(tokens, shards[0].in_features, device="cuda").to(dtype)
    outputs = min(shards[0].out_features, 64 * shards[0].segments[0].vector_len)
    first = tuple(replace(segment, words=segment.words[:64].contiguous()) for segment in shards[0].segments)
    part = _in_float64(replace(shards[0], segments=first, out_features=outputs))
    exact_layout = compact.build([part], torch.float64, x.device)
    some = x[:CHECKED_TOKENS].double()
    exact = reference.linear(some, *exact_layout.tensors().values(), None, exact_layout.plan)
    return ((layer(x)[:CHECKED_TOKENS, :outputs].double() - exact).norm() / exact.norm()).item()


def _in_float64(shard: ModuleShard) -> ModuleShard:
    def wide(segment: Segment) -> Segment:
        residual = None if segment.res_book is None else segment.res_book.double()
        return replace(segment, book=segment.book.double(), res_book=residual)

    return replace(shard, segments=tuple(wide(segment) for segment in shard.segments))


def parse_shape(name: str) -> tuple[list[int], int]:
    """``8B qkv`` or ``8192x4096`` (out x in) -> outputs of the modules, inputs."""
    if name in SHAPES:
        return SHAPES[name]
    out, _, inputs = name.partition("x")
    return [int(out)], int(inputs)


def measure(arguments: argparse.Namespace, save: Callable[[Rows], None]) -> Rows:
    dtype = getattr(torch, arguments.dtype)
    gen = torch.Generator("cuda").manual_seed(0)
    dense: dict[tuple[int, int, int], float] = {}
    rows: Rows = []
    limits, commit = Limits.of(torch.cuda.get_device_properties(0)), checkout.commit() or "unknown"
    print(
        f"{'format':18} {'layer':12} {'layout':10}  bits tokens       us    dense      x   Tw/s % mem % gather    error"
    )
    for name in arguments.formats:
        v, k, r = parse_format(name)
        for shape in arguments.shapes:
            outs, inputs = parse_shape(shape)
            extras = arguments.norm, arguments.groups
            shards = [random_shard(v, k, r, out, inputs, dtype, gen, *extras) for out in outs]
            for layout in arguments.layouts:
                layer = build(shards, dtype, layout, arguments.direct)
                for tokens in arguments.tokens:
                    key = (sum(outs), inputs, tokens)
                    if key not in dense:
                        dense[key] = dense_microseconds(*key, dtype)
                    x = torch.randn(tokens, inputs, device="cuda").to(dtype)
                    us = microseconds(lambda i, x=x, layer=layer: layer(x, i), len(layer.copies))
                    error = relative_error(layer, shards, dtype, tokens)
                    percent = limits.percent(Work.of(v, k, r, outs, inputs, tokens), us)
                    row = dict(
                        format=name, layer=shape, out_features=sum(outs), in_features=inputs, tokens=tokens,
                        dtype=arguments.dtype, norm=arguments.norm, groups=arguments.groups, layout=layout,
                        direct=layer.direct,
                        bits_per_weight=round(layer.bits, 3), us=round(us, 2),
                        dense_us=round(dense[key], 2), speedup=round(dense[key] / us, 3),
                        tera_weights_per_s=round(sum(outs) * inputs / us / 1e6, 3), **percent,
                        relative_error=float(f"{error:.3g}"), commit=commit,
                    )  # fmt: skip
                    rows.append(row)
                    cells = f"{layer.bits:5.2f} {tokens:6} {us:8.1f} {dense[key]:8.1f} {row['speedup']:6.2f}"
                    cells += f" {row['tera_weights_per_s']:6.2f} {percent['memory_percent']:5.1f}"
                    cells += f" {percent['gather_percent']:8.1f} {error:8.1e}"
                    print(f"{name:18} {shape:12} {layout:10} {cells}", flush=True)
                del layer
            torch.cuda.empty_cache()
            save(rows)
    return rows


def summarize(rows: Rows) -> None:
    """Geometric means over shapes."""
    groups: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        groups.setdefault((row["format"], row["layout"], row["tokens"]), []).append(row["speedup"])
    print("\ngeometric mean over the layers, x dense")
    tokens = sorted({row["tokens"] for row in rows})
    print(f"{'':29}" + "".join(f"{t:>7}" for t in tokens))
    for name, layout in dict.fromkeys((row["format"], row["layout"]) for row in rows):
        means = [groups.get((name, layout, t)) for t in tokens]
        cells = "".join(f"{math.exp(sum(map(math.log, m)) / len(m)):7.2f}" if m else f"{'':7}" for m in means)
        print(f"{name:18} {layout:10}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="vV-kK[-R]")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NAME|OUTxIN", help=f"{', '.join(SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--layouts", nargs="+", default=["stationary", "aligned", "compact"], choices=memory.LAYOUTS)
    parser.add_argument("--norm", action="store_true", help="with a norm over the columns of each module")
    parser.add_argument("--groups", type=int, default=1, help="of scattered columns, each with books and a column list")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument(
        "--direct", type=int, help="tokens up to which weights are looked up, not decoded; an experiment"
    )
    parser.add_argument("--out", type=Path, help="JSON file to add to, instead of the one in benchmarks/results")
    arguments = parser.parse_args()
    cuda_extension()
    properties = torch.cuda.get_device_properties(0)
    about = dict(
        date=datetime.date.today().isoformat(), gpu=properties.name, processors=properties.multi_processor_count,
        torch=torch.__version__, cuda=torch.version.cuda,
    )  # fmt: skip
    file = arguments.out
    if file is None and arguments.direct is None:  # else an experiment, and no row for the record
        file = record.path("kernels", str(about["date"]), properties.name)

    def save(rows: Rows) -> None:
        if file:
            record.add(file, about, rows, KEY)

    try:
        summarize(measure(arguments, save))
    except VPTQFormatError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
