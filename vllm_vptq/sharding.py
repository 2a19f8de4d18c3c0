"""Which part of a layer a rank of a tensor parallel group computes, and which degrees divide it. No vLLM.

The one place with these rules: loading cuts by them, and ``vllm-vptq inspect`` tells by them what a checkpoint admits.
The format itself asks for nothing: shard bounds may lie within a vector, a group or a permutation (see
``parameters.py``). So only sizes decide: heads, output rows and input columns must divide.
"""

from __future__ import annotations

Range = tuple[int, int]


class IndivisibleError(ValueError):
    """A size that a tensor parallel degree does not divide. One line: what, how many, and the degree."""


def share(size: int, tp: int, rank: int, what: str) -> Range:
    """The ``[lo, hi)`` of ``size`` items that ``rank`` of ``tp`` holds; IndivisibleError naming ``what`` they are."""
    if size % tp:
        raise IndivisibleError(f"{size} {what} do not divide by {tp}")
    width = size // tp
    return rank * width, (rank + 1) * width


def kv_share(kv_heads: int, tp: int, rank: int) -> Range:
    """The KV heads that ``rank`` of ``tp`` holds: a share of them, or one that several ranks hold a copy of."""
    if tp < kv_heads:
        return share(kv_heads, tp, rank, "KV heads")
    if tp % kv_heads:
        raise IndivisibleError(f"{kv_heads} KV heads can be neither divided nor copied evenly among {tp}")
    head = rank // (tp // kv_heads)
    return head, head + 1


def qkv_shares(
    heads: int, kv_heads: int, head_size: int, v_head_size: int, tp: int, rank: int
) -> list[tuple[int, Range]]:
    """For q, k and v: the rows of the whole projection, and the ``[lo, hi)`` of them that ``rank`` of ``tp`` computes.

    IndivisibleError where heads cannot be shared out.
    """
    query = share(heads, tp, rank, "attention heads")
    keys = kv_share(kv_heads, tp, rank)
    parts = ((heads, query, head_size), (kv_heads, keys, head_size), (kv_heads, keys, v_head_size))
    return [(count * size, (lo * size, hi * size)) for count, (lo, hi), size in parts]
