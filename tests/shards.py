"""Makes shards of random layers; turns shards and layouts back into dense weights, once through the code, once by
reading their docstrings slowly."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import random_tensors
from vllm_vptq.format import LayerSpec, dequantize
from vllm_vptq.layouts.compact import CompactLayout
from vllm_vptq.layouts.plan import ABSENT, NORM_COLUMNS, NORM_NONE, decode
from vllm_vptq.parameters import ModuleShard, Range, Segment, cut_module
from vllm_vptq.reference import decode_tile

CPU = torch.device("cpu")


def split(size: int, parts: int) -> list[Range]:
    """``size`` in as equal parts as possible; parts that would be empty are left out."""
    bounds = [size * i // parts for i in range(parts + 1)]
    return [(lo, hi) for lo, hi in itertools.pairwise(bounds) if lo < hi]


def fused_layer(
    specs: list[LayerSpec | None],
    dtype: torch.dtype = torch.float16,
    rows: Range | None = None,
    columns: Range | None = None,
    device: torch.device = CPU,
) -> tuple[list[ModuleShard], Tensor]:
    """Shards of a fused layer of random modules (None: a dense one of 24 rows), and its weight in float64.

    ``rows``, ``columns``: those of each quantized module that the rank has.
    """
    shards, weights = [], []
    for seed, spec in enumerate(specs):
        if spec is None:
            gen = torch.Generator().manual_seed(seed)
            dense = torch.randn(24, shards[0].in_features, generator=gen).to(dtype)
            shards.append(ModuleShard(*dense.shape, dense=dense.to(device)))
            weights.append(dense.double())
            continue
        tensors = random_tensors(spec, seed, dtype)
        span = rows or (0, spec.shape[0]), columns or (0, spec.shape[1])
        shards.append(cut_module(tensors, spec, *span, device))
        weights.append(dequantize(tensors, spec, torch.float64)[slice(*span[0]), slice(*span[1])])
    return shards, torch.cat(weights).to(device)


def drawn_part(spec: LayerSpec, seed: int, dtype: torch.dtype, data: st.DataObject) -> tuple[ModuleShard, Tensor]:
    """Some rows and columns of a random module, and their weight in float64."""
    tensors = random_tensors(spec, seed, dtype)
    rows, columns = (
        tuple(sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))))
        for size in spec.shape
    )
    weight = dequantize(tensors, spec, torch.float64)[slice(*rows), slice(*columns)]
    return cut_module(tensors, spec, rows, columns), weight


def slow_dense(shard: ModuleShard) -> Tensor:
    """The shard's weight in float64, read element by element as the docstrings of its fields say."""
    if shard.dense is not None:
        assert not shard.segments
        return shard.dense.double()
    weight = torch.full((shard.out_features, shard.in_features), torch.nan, dtype=torch.float64).numpy()
    for segment in shard.segments:
        columns = range(shard.in_features) if segment.columns is None else segment.columns.tolist()
        book, res_book = (None if b is None else b.double().numpy() for b in (segment.book, segment.res_book))
        streams = [_stream(row) for row in segment.words.tolist()]
        bits = segment.index_bits + segment.res_bits
        for n in range(shard.out_features):
            r, element = divmod(n + segment.skip, segment.vector_len)
            for j, column in enumerate(columns):
                merged = streams[r] >> (j * bits) & ((1 << bits) - 1)
                value = book[merged & ((1 << segment.index_bits) - 1), element]
                if res_book is not None:
                    value = value + res_book[merged >> segment.index_bits, element]
                assert weight[n, column] != weight[n, column], "two segments code the same weight"
                weight[n, column] = value
    if shard.scale is None:
        return torch.from_numpy(weight)
    scale, shift = shard.scale.double(), shard.shift.double()
    if shard.norm_dim == 1:
        scale, shift = scale[:, None], shift[:, None]
    return torch.from_numpy(weight) * scale + shift


def _stream(words: list[int]) -> int:
    return sum((word % (1 << 32)) << (32 * i) for i, word in enumerate(words))


def layout_dense(layout: CompactLayout, in_features: int) -> list[Tensor]:
    """The weight of every module of a layout in float64, through ``plan.decode`` and ``reference.decode_tile``."""
    weights, start = [], 0
    for module in decode(layout.plan):
        assert module.out_start == start
        start += module.out_features
        if module.dense_offset != ABSENT:
            flat = layout.dense[module.dense_offset :][: module.out_features * in_features]
            weights.append(flat.view(module.out_features, in_features).double())
            continue
        weight = torch.zeros(module.out_features, in_features, dtype=torch.float64)
        for segment in module.segments:
            tile = decode_tile(segment, layout.qweight, layout.codebooks, 0, segment.vector_rows, torch.float64)
            rows = tile.transpose(1, 2).reshape(-1, segment.num_columns)
            columns: slice | Tensor = slice(None)
            if segment.column_offset != ABSENT:
                columns = layout.columns[segment.column_offset :][: segment.num_columns].long()
            weight[:, columns] += rows[segment.skip : segment.skip + module.out_features]
        if module.norm_kind != NORM_NONE:
            by_column = module.norm_kind == NORM_COLUMNS
            size = in_features if by_column else module.out_features
            scale, shift = layout.norm[module.norm_offset :][: 2 * size].double().view(2, size, 1)
            weight = weight * (scale.T if by_column else scale) + (shift.T if by_column else shift)
        weights.append(weight)
    return weights


def check_segment(segment: Segment, in_features: int) -> None:
    """What a segment promises besides its values."""
    bits = segment.index_bits + segment.res_bits
    assert segment.words.dtype == torch.int32
    assert segment.words.shape[1] == -(-segment.num_columns * bits // 32)
    assert 0 <= segment.skip < segment.vector_len
    assert (segment.columns is None) == (segment.num_columns == in_features)
    if segment.columns is not None:
        assert segment.columns.dtype == torch.int32
        columns = segment.columns.tolist()
        assert columns == sorted(set(columns))
        assert columns[0] >= 0
        assert columns[-1] < in_features
