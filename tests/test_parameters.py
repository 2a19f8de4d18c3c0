"""Shards of every tensor parallel degree, cut across rows, columns and both, put together again."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.shards import CPU, check_segment, layout_dense, slow_dense, split
from tests.strategies import EVERYTHING, few, random_tensors, specs
from vllm_vptq import ops
from vllm_vptq.format import LayerSpec, dequantize
from vllm_vptq.layouts import compact
from vllm_vptq.parameters import ModuleShard, cut_module

DEGREES = range(1, 9)
SEEDS = st.integers(0, 2**32)
CUTS = {"outputs": lambda tp: (tp, 1), "inputs": lambda tp: (1, tp), "both": lambda tp: (tp, 3)}


def grid(spec: LayerSpec, row_parts: int, column_parts: int):
    """The (rows, columns) of every rank."""
    out, cols = spec.shape
    return itertools.product(split(out, row_parts), split(cols, column_parts))


def compact_dense(shard: ModuleShard) -> torch.Tensor:
    (weight,) = layout_dense(compact.build([shard], torch.float64, CPU), shard.in_features)
    return weight


@pytest.mark.parametrize("tp", DEGREES)
@pytest.mark.parametrize("cut", CUTS)
@few(8)
@given(spec=specs(), seed=SEEDS)
def test_shards_reassemble(cut, tp, spec, seed):
    tensors = random_tensors(spec, seed)
    expected = dequantize(tensors, spec, torch.float64)
    found = torch.full_like(expected, torch.nan)
    for rows, columns in grid(spec, *CUTS[cut](tp)):
        shard = cut_module(tensors, spec, rows, columns)
        assert (shard.out_features, shard.in_features) == (rows[1] - rows[0], columns[1] - columns[0])
        found[slice(*rows), slice(*columns)] = compact_dense(shard)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cut", CUTS)
@few(40)
@given(spec=specs(max_out=24, max_group_size=24), seed=SEEDS, tp=st.sampled_from(DEGREES))
def test_shards_are_what_their_docstrings_say(cut, spec, seed, tp):
    tensors = random_tensors(spec, seed)
    expected = dequantize(tensors, spec, torch.float64)
    for rows, columns in grid(spec, *CUTS[cut](tp)):
        shard = cut_module(tensors, spec, rows, columns)
        for segment in shard.segments:
            check_segment(segment, shard.in_features)
        assert torch.equal(slow_dense(shard), expected[slice(*rows), slice(*columns)])


@few(60)
@given(spec=specs(), seed=SEEDS, data=st.data())
def test_any_rectangle(spec, seed, data):
    """Ranks need not be of equal size: vLLM pads some, and replicates others."""
    out, cols = spec.shape

    def part(size: int) -> tuple[int, int]:
        lo = data.draw(st.integers(0, size - 1))
        return lo, data.draw(st.integers(lo + 1, size))

    rows, columns = part(out), part(cols)
    tensors = random_tensors(spec, seed)
    expected = dequantize(tensors, spec, torch.float64)[slice(*rows), slice(*columns)]
    assert torch.equal(compact_dense(cut_module(tensors, spec, rows, columns, CPU)), expected)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [1, 4, 5, 11, 12, 16, 23, 31, 32])
def test_streams_that_can_and_cannot_be_cut_at_a_word(bits, groups, tp):
    """In natural order a cut may fall on a word, so that the stored words are taken as they are, or within one."""
    main = -(-bits // 2)
    residual = 1 << (bits - main) if bits > main else 0
    spec = LayerSpec(192, 7, 3, 1 << main, residual, group_num=groups)
    tensors = random_tensors(spec, seed=bits)
    expected = dequantize(tensors, spec, torch.float64)
    for rows, columns in grid(spec, 2, tp):
        shard = cut_module(tensors, spec, rows, columns)
        assert torch.equal(slow_dense(shard), expected[slice(*rows), slice(*columns)])
        assert torch.equal(compact_dense(shard), expected[slice(*rows), slice(*columns)])


@pytest.mark.parametrize("packed", [True, False])
def test_more_indices_than_are_repacked_at_a_time(packed):
    spec = LayerSpec(512, 18000, 2, 16, 4, enable_perm=True, is_indice_packed=packed)
    tensors = random_tensors(spec, seed=0)
    rows, columns = (1, 17998), (0, 512)
    shard = cut_module(tensors, spec, rows, columns)
    (weight,) = layout_dense(compact.build([shard], torch.float32, CPU), 512)
    assert torch.equal(weight, dequantize(tensors, spec, torch.float64)[slice(*rows)])


@few(60)
@given(spec=specs(max_out=24), seed=SEEDS, tp=st.sampled_from(DEGREES))
def test_the_identity_through_the_op_is_the_shard(spec, seed, tp):
    tensors = random_tensors(spec, seed)
    expected = dequantize(tensors, spec, torch.float64)
    for rows, columns in grid(spec, 2, tp):
        layout = compact.build([cut_module(tensors, spec, rows, columns)], torch.float64, CPU)
        identity = torch.eye(columns[1] - columns[0], dtype=torch.float64)
        weight = ops.linear(identity, *layout.tensors().values(), None, layout.plan).T
        torch.testing.assert_close(weight, expected[slice(*rows), slice(*columns)], rtol=1e-13, atol=1e-13)


def test_a_layer_in_natural_order_needs_no_column_list():
    spec = LayerSpec(48, 12, 4, 16, enable_perm=True)
    tensors = random_tensors(spec, seed=1)
    for rows, columns in grid(spec, 2, 3):
        (segment,) = cut_module(tensors, spec, rows, columns).segments
        assert segment.columns is None


def test_books_are_shared_between_cuts():
    tensors = random_tensors(EVERYTHING, seed=2)
    shards = [cut_module(tensors, EVERYTHING, rows, (0, 22), CPU) for rows in split(10, 3)]
    for segments in zip(*(shard.segments for shard in shards), strict=True):
        assert len({segment.book.data_ptr() for segment in segments}) == 1
        assert len({None if s.res_book is None else s.res_book.data_ptr() for s in segments}) == 1


def test_cutting_changes_no_tensor():
    for spec in (EVERYTHING, LayerSpec(64, 8, 4, 16)):
        tensors = random_tensors(spec, seed=3)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        layouts = [
            compact.build([cut_module(tensors, spec, rows, columns)], torch.float32, CPU)
            for rows, columns in grid(spec, 3, 3)
        ]
        for layout in layouts:
            for tensor in layout.tensors().values():
                if tensor is not None:
                    tensor.zero_()
        assert all(torch.equal(tensors[name].view(torch.uint8), before[name].view(torch.uint8)) for name in tensors)
