"""The compact layout on a GPU without one: its jobs worked off in float64, as csrc/cuda/compact.cu does in fp32.

As in kernels64.py, memory that nobody has written is NaN, and an address outside of a tensor or a second write
to a place of the workspace or of the weight fail.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels64 import Kernels, Workspace
from tests.shards import CPU, drawn_part, fused_layer
from tests.strategies import few, spec_extras, specs
from vllm_vptq.format import LayerSpec
from vllm_vptq.layouts import compact, streams
from vllm_vptq.layouts.work import ABSENT, Job, Kind, LookupLayout, Module
from vllm_vptq.parameters import ModuleShard

WARPS = 8
"""Of a thread block, each of which takes a vector row."""
EXTRAS = spec_extras(num_outlier_centroids=700)


class CompactKernels(Kernels):
    """A layer as the GPU sees it: ``prepare.cu`` and ``wide.cuh`` have no part in it."""

    def __init__(self, layout: LookupLayout) -> None:
        super().__init__(replace(layout, books=layout.books[:0]))
        self.books = layout.books.double().numpy()
        assert not self.plan.stationary and self.plan.shared_bytes == 0
        (v,) = self.plan.variants
        (launch,) = v.launches
        assert launch.wide == ABSENT and not v.preparations and v.max_tokens == streams.TOKENS
        assert all(len(jobs) == 1 for jobs in launch.jobs)  # a thread block reads the job of its own number

    def _multiply(self, v: SimpleNamespace, x: np.ndarray) -> np.ndarray:
        workspace = Workspace(len(x), v.stride)
        for (job,) in v.launches[0].jobs:
            columns = slice(job.column_begin, job.column_end)
            if job.kind == Kind.DOT:
                assert job.row_begin == 0 and job.row_end >= len(x) and columns == slice(0, x.shape[1])
                dot = (x * self._norm(job.shift, x.shape[1], 1)).sum(1, keepdims=True)
                workspace.store(job.out, dot)
                continue
            assert job.kind == Kind.COMPACT and job.row_end - job.row_begin <= WARPS
            acts = (x * self._norm(job.scale, x.shape[1], 1))[:, self._sources(job)[columns]]
            for row in range(job.row_begin, job.row_end):
                vectors = self._vectors(job, row, job.plane)[columns]
                workspace.store(job.out + row * 8, acts @ vectors)
        return workspace.sums

    def _vectors(self, job: Job, row: int, plane: int) -> np.ndarray:
        """Elements ``8 * plane`` .. of the vectors of a row, ``[column_end, 8]``; zeros behind the last."""
        bits, at = job.index_bits + job.res_bits, np.arange(job.column_end)
        assert 1 <= bits <= 32 and job.codes % 4 == 0
        first = job.codes + row * job.row_words + at * bits // 32
        words = self._take("codes", 0, first.max() + 2)  # two for each index, the last one too
        merged = (words[first] | words[first + 1] << 32) >> at * bits % 32 & (1 << bits) - 1
        vectors = self._entries_of(job.book, merged & (1 << job.index_bits) - 1, job.vector_len, plane)
        if job.res_book != ABSENT:
            vectors = vectors + self._entries_of(job.res_book, merged >> job.index_bits, job.vector_len, plane)
        return vectors

    def _entries_of(self, book: int, index: np.ndarray, length: int, plane: int) -> np.ndarray:
        assert book * 2 % 16 == 0  # loaded 16 bytes at a time where the length is a multiple of 8
        element = np.arange(min(8, length - plane * 8))
        at = book + index[:, None] * length + plane * 8 + element
        assert at.min() >= 0 and at.max() < len(self.books)
        return np.pad(self.books[at], ((0, 0), (0, 8 - len(element))))

    def _decode(self, index: int, m: Module, begin: int, end: int) -> np.ndarray:
        weight = np.full((end - begin, self.plan.in_features), np.nan)
        for d in self.plan.decodings:
            if d.module != index:
                continue
            job, length, skip = d.job, d.part.vector_len, d.part.skip
            assert d.residual.kind == ABSENT and (job.column_begin, job.row_begin) == (0, 0)
            source, last = self._sources(job), -(-(end + skip) // length)
            assert last <= job.row_end
            for row in range((begin + skip) // length, last):
                for plane in range(-(-length // 8)):
                    value = self._vectors(job, row, plane)
                    if job.scale != ABSENT:
                        size = weight.shape[1]
                        value = value * self._norm(job.scale, size, 1)[source, None]
                        value = value + self._norm(job.shift, size, 0)[source, None]
                    for e in range(min(8, length - plane * 8)):
                        output = row * length - skip + plane * 8 + e
                        if not begin <= output < end:
                            continue
                        assert np.isnan(weight[output - begin, source]).all(), "a weight was written twice"
                        size = m.out_end - m.out_begin
                        factor = self._norm(m.scale, size, 1)[output]
                        offset = self._norm(m.shift, size, 0)[output] if m.scale != ABSENT else 0
                        weight[output - begin, source] = value[:, e] * factor + offset
        return weight


def check(shards: list[ModuleShard], weight: Tensor, processors: int = 132, dtype: torch.dtype = torch.float16) -> None:
    """Compares products and the decoded weight with ``weight`` in float64."""
    dense = weight.double().numpy()
    x = np.random.default_rng(0).standard_normal((11, dense.shape[1]))
    made = streams.build(compact.build(shards, dtype, CPU), dense.shape[1], processors, 5)
    kernels = CompactKernels(made)
    for tokens in (1, 5, 11):  # the last one in two launches
        np.testing.assert_allclose(kernels.linear(x[:tokens]), x[:tokens] @ dense.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(kernels.weight(40), dense, rtol=1e-12, atol=1e-12)


FORMATS = [(8, 65536, 0), (8, 2, 65536), (12, 4096, 4096), (16, 65536, 65536), (5, 8, 2)]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("v", "k", "r"), FORMATS)
def test_formats(v, k, r, extra):
    extras = EXTRAS[extra]
    spec = LayerSpec(1500 + extras.get("outlier_size", 0), 61, v, k, r, **extras)
    check(*fused_layer([spec]))


def test_fused():
    plain = LayerSpec(2300, 96, 8, 65536)
    rows = LayerSpec(2300, 33, 6, 256, 16, **EXTRAS["row norm"])
    columns = LayerSpec(2300, 50, 16, 64, **EXTRAS["column norm"])
    for processors in (1, 132):
        check(*fused_layer([plain, None, columns, rows, None, plain]), processors)


@few(200)
@given(
    spec=specs(max_out=60, max_group_size=200),
    seed=st.integers(0, 99),
    processors=st.sampled_from([1, 7, 132]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_any_spec(spec, seed, processors, dtype, data):
    shard, weight = drawn_part(spec, seed, dtype, data)
    check([shard], weight, processors, dtype)
