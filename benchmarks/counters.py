"""Calls of layers with nothing around them, for Nsight Compute to count: docs/kernels.md has the command.

    python -m benchmarks.counters --formats v8-k256-256 --shapes 8192x8192

Only the calls lie between the start and the stop of CUDA's profiler. A line for each is printed, in their order, which
is that of the profiled launches.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.kernels import build, parse_shape, random_shard
from vllm_vptq.build import cuda_extension
from vllm_vptq.format import parse_format


def profile(format_name: str, shape: str, tokens: int, norm: bool, calls: int) -> None:
    """Some calls of one layer in the stationary layout, whose weights come from memory each time."""
    gen = torch.Generator("cuda").manual_seed(0)
    outs, inputs = parse_shape(shape)
    spec = parse_format(format_name)
    shards = [random_shard(*spec, out, inputs, torch.float16, gen, norm) for out in outs]
    layer = build(shards, torch.float16, "stationary", 512)
    x = torch.randn(tokens, inputs, device="cuda").half()
    layer(x, 0)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for i in range(calls):
        layer(x, i + 1)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    for _ in range(calls):
        print(f"{format_name} {shape} {tokens} {'norm' if norm else 'plain'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["v8-k256-256", "v12-k4096-4096"], metavar="vV-kK[-R]")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "8192x8192"], metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without a norm")
    parser.add_argument("--calls", type=int, default=2)
    words = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "error: no GPU\n")
    cuda_extension()
    for name in words.formats:
        for shape in words.shapes:
            profile(name, shape, words.tokens, not words.plain, words.calls)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
