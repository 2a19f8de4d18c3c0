"""Who computes what in a tensor parallel group: the rules alone, and against vLLM's own layers."""

from __future__ import annotations

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
