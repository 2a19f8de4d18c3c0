"""Who computes what in a tensor parallel group: the rules alone, and against vLLM's own layers."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.model_executor.layers.linear import QKVParallelLinear

from tests.layers import rank as rank  # a fixture
from vllm_vptq.linear import output_partitions
from vllm_vptq.sharding import IndivisibleError, kv_share, qkv_shares, share


def test_shares_are_all_of_it_in_order():
    assert [share(12, 4, rank, "rows") for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]


def test_kv_heads_are_divided_or_copied():
    assert [kv_share(8, 2, rank) for rank in range(2)] == [(0, 4), (4, 8)]
    assert [kv_share(2, 4, rank) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "words"),
    [
        (40, 8, 16, "40 attention heads do not divide by 16"),
        (12, 6, 4, "6 KV heads do not divide by 4"),
        (24, 3, 4, "3 KV heads can be neither divided nor copied evenly among 4"),
    ],
)
def test_heads_that_cannot_be_shared_out(heads, kv_heads, tp, words):
    with pytest.raises(IndivisibleError, match=rf"\A{words}\Z"):
        qkv_shares(heads, kv_heads, 16, 16, tp, 0)


def test_rows_and_columns_that_cannot():
    with pytest.raises(IndivisibleError, match=r"\A120 output rows do not divide by 7\Z"):
        share(120, 7, 0, "output rows")


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (12, 6), (40, 8), (24, 3)])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_the_same_degrees_as_vllm(rank, heads, kv_heads, tp):
    """vLLM refuses in its layers' constructors, before ours could."""
    for r in range(tp):
        rank(r, tp)
        try:
            layer = QKVParallelLinear(16, 4, heads, kv_heads, bias=False, prefix="l.qkv_proj")
        except AssertionError:
            with pytest.raises(IndivisibleError):
                qkv_shares(heads, kv_heads, 4, 4, tp, r)
        else:
            shares = output_partitions(layer)
            assert [hi - lo for _, (lo, hi) in shares] == layer.output_partition_sizes
            assert shares[0][1] == (r * layer.output_partition_sizes[0], (r + 1) * layer.output_partition_sizes[0])
            kv_rank = r // layer.num_kv_head_replicas
            assert shares[1][1] == (
                kv_rank * layer.output_partition_sizes[1],
                (kv_rank + 1) * layer.output_partition_sizes[1],
            )


READER = """
import ctypes, mmap, sys
import torch
from vllm_vptq.format import LayerSpec, tensor_shapes
from vllm_vptq.parameters import Source

split, part = sys.argv[1], int(sys.argv[2])
spec = LayerSpec(8192, 8192, 8, 256, 256)
memory = mmap.mmap(-1, 16 << 20)
indices = torch.frombuffer(memory, dtype=torch.int32).reshape(1, 1024, 4096)
indices.copy_(torch.arange(indices.numel()).mul_(2654435761).reshape(indices.shape))
rows, columns = (0, 8192), (0, 8192)
if split == "rows":
    rows, keep = (2048 * part, 2048 * part + 2048), (slice(256 * part, 256 * part + 256), slice(None))
else:
    columns, keep = (2048 * part, 2048 * part + 2048), (slice(None), slice(1024 * part, 1024 * part + 1024))
wanted = indices[0][keep].clone()
protect = ctypes.CDLL(None).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
assert mmap.PAGESIZE == 4096
mine = torch.zeros(1024, 4, dtype=torch.bool)  # a vector row takes four pages
mine[keep[0], slice(None) if split == "rows" else part] = True
for page in (~mine).flatten().nonzero().flatten().tolist():
    assert protect(indices.data_ptr() + page * 4096, 4096, 0) == 0
books = {name: torch.randn(tensor_shapes(spec)[name]).half() for name in ("centroids.weight", "res_centroids.weight")}
source = Source("m", spec, [rows], columns, spec.shape)
for name, tensor in {"indices": indices, **books}.items():
    source.take(name, tensor, torch.device("cpu"))
((segment,),) = (shard.segments for shard in source.shards)
assert torch.equal(segment.words, wanted)
print("done", flush=True)
if len(sys.argv) > 3:
    indices.sum()  # to see that the rest cannot be read
"""


@pytest.mark.skipif(sys.platform != "linux" or mmap.PAGESIZE != 4096, reason="needs Linux and pages of 4 KiB")
@pytest.mark.parametrize("more", [[], ["all"]], ids=["its part", "planted: all"])
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_a_rank_reads_only_its_part_of_the_indices(split, more):
    """The pages of the other three ranks end the process that reads them: maps of files are read as they are used."""
    command = [sys.executable, "-c", READER, split, "2", *more]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
    assert done.returncode == (-signal.SIGSEGV if more else 0)
