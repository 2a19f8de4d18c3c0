"""The VPTQ checkpoint format, and nothing else: no vLLM, no kernels.

A linear layer ``W [out_features, in_features]`` is cut into vectors of ``v`` consecutive *output* rows of one
column. Each vector is an index into a codebook of ``k`` centroids, optionally plus an index into a residual
codebook. Columns may be split into groups with a codebook each, the first columns may be coded by an outlier
codebook, columns may be stored permuted, and the result may be scaled and shifted per column or per row.

Everything that reads or writes checkpoints goes through the names in ``__all__``; ``dequantize`` is the oracle
that every kernel and layout is tested against. Format: microsoft/VPTQ (https://arxiv.org/abs/2409.17066).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vptq.packing import pack_indices, unpack_indices
from vllm_vptq.specs import LayerSpec, LayerSpecs, VPTQFormatError, is_vptq_section, parse_format, read_layer_specs

__all__ = [
    "LayerSpec",
    "LayerSpecs",
    "VPTQFormatError",
    "as_index",
    "column_blocks",
    "dequantize",
    "effective_bits",
    "is_vptq_section",
    "pack_indices",
    "parse_format",
    "read_layer_specs",
    "tensor_shapes",
    "unpack_indices",
    "validate",
    "validate_shapes",
]

Tensors = Mapping[str, Tensor]
"""The tensors of one module, by their name below it: ``indices``, ``centroids.weight``, ..."""

_BOOK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# ---------------------------------------------------------------------------------------------------------------
# Tensors of one module


def tensor_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor a module of this spec must have on disk, ``bias`` aside."""
    out, cols = spec.shape
    v, groups, gs = spec.vector_len, spec.group_num, spec.group_size
    rows = -(-out // v)  # rounded up
    width = -(-gs * spec.total_bits // 32) if spec.is_indice_packed else gs
    shapes: dict[str, tuple[int, ...]] = {
        "indices": (groups, rows, width),
        "centroids.weight": (groups, spec.num_centroids * v),
    }
    if spec.num_res_centroids:
        shapes["res_centroids.weight"] = (groups, spec.num_res_centroids * v)
        if not spec.is_indice_packed:
            shapes["res_indices"] = (groups, rows, gs)
    if spec.outlier_size:
        v0 = spec.outlier_vector_len
        shapes["outlier_centroids.weight"] = (1, spec.num_outlier_centroids * v0)
        shapes["outlier_indices"] = (1, -(-out // v0), spec.outlier_size)
    if spec.enable_perm:
        shapes["perm"] = (cols,)
    if spec.enable_norm:
        length = cols if spec.norm_dim == 0 else out
        shapes["weight_scale"] = shapes["weight_bias"] = (length,)
    return shapes


def effective_bits(spec: LayerSpec, book_bits: int = 16) -> float:
    """Stored bits per weight: indices, codebooks, norm and permutation, books in ``book_bits``-bit floats."""
    shapes = tensor_shapes(spec)
    widths = {"indices": 32 if spec.is_indice_packed else 16, "res_indices": 16, "outlier_indices": 16, "perm": 16}
    out, cols = spec.shape
    return sum(math.prod(s) * widths.get(n, book_bits) for n, s in shapes.items()) / (out * cols)


def as_index(tensor: Tensor) -> Tensor:
    """Indices as int64, whatever 16-bit disguise they are stored in (int16, uint16 or float16 bits)."""
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.uint16):
        tensor = tensor.view(torch.int16)
    if tensor.dtype == torch.int16:
        return tensor.to(torch.int64) & 0xFFFF
    return tensor.to(torch.int64)


def validate(name: str, tensors: Tensors, spec: LayerSpec) -> None:
    """Checks one module's tensors against its spec, so that nothing behind this can read outside a book.

    Raises VPTQFormatError naming ``name``, the tensor, what was found and what was expected: what
    :func:`validate_shapes` raises, non-finite books or norms, indices beyond their book, a permutation that is none.
    """
    validate_shapes(name, tensors, spec)
    for key in tensor_shapes(spec):
        if _allowed_dtypes(key, spec) is _BOOK_DTYPES and not bool(torch.isfinite(tensors[key]).all()):
            raise VPTQFormatError(name, f"tensor {key} holds NaN or infinite values, expected finite ones")

    def in_book(key: str, size: int) -> None:
        index = as_index(tensors[key])
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise VPTQFormatError(
                name, f"tensor {key} holds index {low if low < 0 else high}, expected 0 to {size - 1}"
            )

    if not spec.is_indice_packed:  # a packed index has just the bits of its book
        in_book("indices", spec.num_centroids)
        if spec.num_res_centroids:
            in_book("res_indices", spec.num_res_centroids)
    if spec.outlier_size:
        in_book("outlier_indices", spec.num_outlier_centroids)
    if spec.enable_perm:
        perm = as_index(tensors["perm"]).sort().values
        outside = perm[(perm < 0) | (perm >= perm.numel())]
        twice = perm[1:][perm[1:] == perm[:-1]]
        if outside.numel() or twice.numel():
            found = f"column {int(outside[0])}" if outside.numel() else f"column {int(twice[0])} twice"
            raise VPTQFormatError(name, f"tensor perm holds {found}, expected a permutation of 0 to {perm.numel() - 1}")


def validate_shapes(name: str, tensors: Tensors, spec: LayerSpec) -> None:
    """The part of :func:`validate` that reads no values, so that the tensors may be meta tensors.

    Raises VPTQFormatError for missing or unknown tensors, shapes and dtypes.
    """
    shapes = tensor_shapes(spec)
    for missing in sorted(shapes.keys() - tensors.keys()):
        raise VPTQFormatError(name, f"tensor {missing} is missing, expected shape {list(shapes[missing])}")
    for extra in sorted(tensors.keys() - shapes.keys() - {"bias"}):
        raise VPTQFormatError(name, f"unknown tensor {extra}; its configuration expects {', '.join(sorted(shapes))}")
    for key, shape in shapes.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise VPTQFormatError(name, f"tensor {key} has shape {list(tensor.shape)}, expected {list(shape)}")
        allowed = _allowed_dtypes(key, spec)
        if tensor.dtype not in allowed:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise VPTQFormatError(
                name, f"tensor {key} is {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}"
            )


def _allowed_dtypes(key: str, spec: LayerSpec) -> tuple[torch.dtype, ...]:
    if key == "indices" and spec.is_indice_packed:
        return (torch.int32,)
    if key.endswith("indices"):
        return (torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32, torch.int64)
    if key == "perm":
        return (torch.int16, torch.uint16, torch.int32, torch.int64)
    return _BOOK_DTYPES


# ---------------------------------------------------------------------------------------------------------------
# Values


@dataclass(frozen=True)
class ColumnBlock:
    """Columns that share one pair of books: a group, or the outliers.

    ``columns`` int64 ``[C]`` holds the original column of each stored one, ``book`` ``[k, v]`` and ``res_book``
    ``[r, v]`` (or None) the centroids in the dtype on disk. Indices stay as stored until :meth:`read`, for a large
    layer's do not fit the memory one would like to spend on them.
    """

    columns: Tensor
    book: Tensor
    res_book: Tensor | None
    index_bits: int
    res_bits: int
    stored: Tensor
    """``[R, words]`` int32 if ``packed``, else ``[R, C]`` 16-bit."""
    stored_res: Tensor | None
    packed: bool

    @property
    def vector_rows(self) -> int:
        """R, the number of vectors in a column."""
        return self.stored.shape[0]

    def read(self, lo: int, hi: int, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """Main and residual indices int64 ``[hi - lo, C]`` of the vector rows from ``lo`` to ``hi``."""
        stored = self.stored[lo:hi].to(device)
        if not self.packed:
            return as_index(stored), None if self.stored_res is None else as_index(self.stored_res[lo:hi].to(device))
        merged = unpack_indices(stored, self.index_bits + self.res_bits, self.columns.numel())
        if not self.res_bits:
            return merged, None
        return merged & ((1 << self.index_bits) - 1), merged >> self.index_bits


def column_blocks(tensors: Tensors, spec: LayerSpec) -> Iterator[ColumnBlock]:
    """A module's column blocks, outliers first. The tensors must pass :func:`validate`."""
    _, cols = spec.shape
    device = tensors["indices"].device
    natural = as_index(tensors["perm"]) if spec.enable_perm else torch.arange(cols, device=device)
    ol, gs, v = spec.outlier_size, spec.group_size, spec.vector_len
    if ol:
        book = tensors["outlier_centroids.weight"].reshape(-1, spec.outlier_vector_len)
        bits = max(1, (spec.num_outlier_centroids - 1).bit_length())
        yield ColumnBlock(natural[:ol], book, None, bits, 0, tensors["outlier_indices"][0], None, packed=False)
    for g in range(spec.group_num):
        has_residual = spec.num_res_centroids > 0
        yield ColumnBlock(
            columns=natural[ol + g * gs : ol + (g + 1) * gs],
            book=tensors["centroids.weight"][g].reshape(-1, v),
            res_book=tensors["res_centroids.weight"][g].reshape(-1, v) if has_residual else None,
            index_bits=spec.index_bits,
            res_bits=spec.res_bits,
            stored=tensors["indices"][g],
            stored_res=tensors["res_indices"][g] if has_residual and not spec.is_indice_packed else None,
            packed=spec.is_indice_packed,
        )


def dequantize(tensors: Tensors, spec: LayerSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[out_features, in_features]`` a module stands for, computed in ``dtype`` (float32 or float64).

    ``y = x @ dequantize(...).T`` is the linear. The tensors must pass :func:`validate`.
    """
    out, cols = spec.shape
    weight = torch.empty(out, cols, dtype=dtype, device=tensors["indices"].device)
    for block in column_blocks(tensors, spec):
        # Columns in natural order are written as a slice; only a gap in them needs an index.
        order = block.columns.argsort()
        columns = block.columns[order]
        first, last = int(columns[0]), int(columns[-1])
        where: slice | Tensor = slice(first, last + 1) if last - first + 1 == columns.numel() else columns
        book = block.book.to(dtype)
        res_book = None if block.res_book is None else block.res_book.to(dtype)
        v = book.shape[1]
        step = max(1, (1 << 20) // (v * columns.numel()))  # a million weights at a time stay in cache
        for lo in range(0, block.vector_rows, step):
            index, residual = block.read(lo, lo + step)
            part = torch.nn.functional.embedding(index[:, order], book)
            if residual is not None and res_book is not None:
                part += torch.nn.functional.embedding(residual[:, order], res_book)
            rows = part.transpose(1, 2).reshape(-1, columns.numel())[: out - lo * v]
            weight[lo * v : lo * v + rows.shape[0], where] = rows
    if spec.enable_norm:
        scale, shift = tensors["weight_scale"].to(dtype), tensors["weight_bias"].to(dtype)
        if spec.norm_dim == 1:
            scale, shift = scale[:, None], shift[:, None]
        weight.mul_(scale).add_(shift)
    return weight
