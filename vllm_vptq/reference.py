"""The op in torch: what defines it, and what runs in float64 and where no native kernel can be had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vllm_vptq.layouts.plan import ABSENT, NORM_COLUMNS, NORM_NONE, NORM_ROWS, ModulePlan, SegmentPlan, decode
from vllm_vptq.packing import unpack_indices

_TILE = 1 << 20
"""Weights decoded at a time: keeps the decoded tile in cache and bounds the extra memory of a call."""


def linear(
    x: Tensor,
    qweight: Tensor,
    codebooks: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    plan: Sequence[int],
) -> Tensor:
    """The arguments and the result of ``ops.linear``."""
    modules = decode(plan)
    check_shapes(x, bias, in_features(modules), out_features(modules))
    # float32 throughout: norm's two terms cancel, and a residual sum is not exact in 16 bits.
    tokens = x.reshape(-1, x.shape[-1]).to(_wide(x.dtype))
    out = tokens.new_zeros(tokens.shape[0], out_features(modules))
    for module in modules:
        rows = out[:, module.out_start : module.out_start + module.out_features]
        if module.dense_offset != ABSENT:
            assert dense is not None
            size = module.out_features * x.shape[-1]
            weight = dense[module.dense_offset : module.dense_offset + size].view(module.out_features, x.shape[-1])
            rows += tokens @ weight.to(tokens.dtype).T
            continue
        scale, shift = _norm(module, norm, x.shape[-1], tokens.dtype)
        scaled = tokens * scale if scale is not None and module.norm_kind == NORM_COLUMNS else tokens
        for segment in module.segments:
            _accumulate(rows, scaled, segment, qweight, codebooks, columns)
        if module.norm_kind == NORM_COLUMNS:
            rows += (tokens @ shift)[:, None]
        elif module.norm_kind == NORM_ROWS:
            assert scale is not None and shift is not None
            rows.mul_(scale).add_(tokens.sum(1, keepdim=True) * shift)
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[1])


def _accumulate(
    rows: Tensor, tokens: Tensor, segment: SegmentPlan, qweight: Tensor, codebooks: Tensor, columns: Tensor | None
) -> None:
    if segment.column_offset != ABSENT:
        assert columns is not None
        tokens = tokens[:, columns[segment.column_offset : segment.column_offset + segment.num_columns].long()]
    v, step = segment.vector_len, max(1, _TILE // (segment.vector_len * segment.num_columns))
    for lo in range(0, segment.vector_rows, step):
        tile = decode_tile(segment, qweight, codebooks, lo, min(lo + step, segment.vector_rows), tokens.dtype)
        # [R, tokens, v]: one small product per vector row spares the transposed copy of the tile.
        part = torch.matmul(tokens, tile).transpose(0, 1).reshape(tokens.shape[0], tile.shape[0] * v)
        first = lo * v - segment.skip
        begin, end = max(first, 0), min(first + part.shape[1], rows.shape[1])
        rows[:, begin:end] += part[:, begin - first : end - first]


def decode_tile(
    segment: SegmentPlan, qweight: Tensor, codebooks: Tensor, lo: int, hi: int, dtype: torch.dtype
) -> Tensor:
    """Vector rows ``lo`` to ``hi`` of a segment, looked up: ``[hi - lo, num_columns, vector_len]`` in ``dtype``."""
    begin = segment.word_offset + lo * segment.row_words
    words = qweight[begin : begin + (hi - lo) * segment.row_words].view(hi - lo, segment.row_words)
    merged = unpack_indices(words, segment.index_bits + segment.res_bits, segment.num_columns)
    tile = embedding(merged & ((1 << segment.index_bits) - 1), _book(segment, codebooks, residual=False, dtype=dtype))
    if segment.res_bits:
        tile += embedding(merged >> segment.index_bits, _book(segment, codebooks, residual=True, dtype=dtype))
    return tile


def _book(segment: SegmentPlan, codebooks: Tensor, *, residual: bool, dtype: torch.dtype) -> Tensor:
    offset = segment.res_book_offset if residual else segment.book_offset
    size = segment.vector_len << (segment.res_bits if residual else segment.index_bits)
    # An outlier book need not fill its bits; indices beyond it were refused at load.
    book = codebooks[offset : offset + size]
    return book[: book.numel() // segment.vector_len * segment.vector_len].view(-1, segment.vector_len).to(dtype)


def _norm(
    module: ModulePlan, norm: Tensor | None, in_features: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    if module.norm_kind == NORM_NONE:
        return None, None
    assert norm is not None
    size = in_features if module.norm_kind == NORM_COLUMNS else module.out_features
    scale, shift = norm[module.norm_offset : module.norm_offset + 2 * size].to(dtype).split(size)
    return scale, shift


def out_features(modules: Sequence[ModulePlan]) -> int:
    """Of a whole layer."""
    return modules[-1].out_start + modules[-1].out_features


def in_features(modules: Sequence[ModulePlan]) -> int | None:
    """Of a whole layer: the columns of a quantized module's segments; None if there is no such module."""
    return next((sum(s.num_columns for s in module.segments) for module in modules if module.segments), None)


def check_shapes(x: Tensor, bias: Tensor | None, columns: int | None, rows: int) -> None:
    """RuntimeError unless x is ``[..., columns]`` and the bias ``[rows]``, which native kernels take for granted."""
    if x.ndim < 1 or (columns is not None and x.shape[-1] != columns):
        raise RuntimeError(f"expected {columns} input features, got x of shape {list(x.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise RuntimeError(f"expected a bias of {rows} numbers, got shape {list(bias.shape)}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
