"""Sums by index, the way of CPUs and the way of GPUs."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.sums import IndexedSums
from tests.strategies import few


@few(60)
@given(
    n=st.integers(1, 700),
    count=st.integers(1, 300),
    width=st.integers(1, 9),
    crowded=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_both_ways_agree(n: int, count: int, width: int, crowded: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n + count)
    index = torch.randint(1 if crowded else count, (n,), generator=generator).to(dtype)
    rows = torch.randn(n, width, generator=generator)
    sums = IndexedSums(index, count)
    sums._sort()
    one, two = sums(rows), sums._by_pieces(rows)
    assert one.shape == two.shape == (count, width)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert torch.equal(two, sums._by_pieces(rows))
    expected = torch.stack([rows[index == i].double().sum(0) for i in range(count)]).float()
    torch.testing.assert_close(two, expected, rtol=1e-4, atol=1e-4)
