"""Compiled code for what every vector of every layer goes through.

The search for centroids: on CPUs ``csrc/cpu/assign.cpp``, on GPUs ``csrc/quantize/assign.cu``. Weights of coded layers
and their gradients in training, and sums by index there and in k-means, on GPUs: ``csrc/quantize/coded.cu``. The GPU's
needs nvcc when it is first used. Where there is none, torch does the same, several times slower.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from vllm_vptq.build import BuildError, cpu_library, cuda_library

logger = logging.getLogger(__name__)

Argument: TypeAlias = "Tensor | int | None"

_PULLED_ROWS = 8
"""``kRows`` of coded.cu."""


def available(device: torch.device) -> bool:
    """Whether there is a compiled search for a device."""
    return device.type == "cpu" or (device.type == "cuda" and _cuda("assign") is not None)


def decodes(device: torch.device) -> bool:
    """Whether there is compiled code for coded layers on a device: :func:`decode`, :func:`pull`, :func:`sum_pieces`."""
    return device.type == "cuda" and _cuda("coded") is not None


def prepare(device: torch.device) -> None:
    """Builds the code for a device if that was not done yet; BuildError where a CPU's can't be, as without compiler."""
    if device.type == "cpu":
        cpu_library("assign")
    else:
        _cuda("assign")
        _cuda("coded")


def assign(points: Tensor, main: Tensor, residual: Tensor | None, candidates: int) -> tuple[Tensor, Tensor | None]:
    """Main and residual indices int64 ``[n]`` for points ``[n, v]`` and books ``[k, v]`` and ``[r, v]``, float32."""
    points = points.contiguous()
    index = torch.empty(len(points), dtype=torch.int64, device=points.device)
    second = None if residual is None else torch.empty_like(index)
    if len(points):
        books, count = _books(main, residual), _candidates(main, residual, candidates)
        scratch = _scratch(points, len(points), count, residual)
        _call("assign", "vptq_assign", points, len(points), points.shape[1], *books, count, index, second, *scratch)
    return index, second


def code_block(
    block: Tensor, matrix: Tensor, main: Tensor, residual: Tensor | None, candidates: int, codes: tuple
) -> Tensor:
    """:func:`quantize.columns.code_block_torch`, compiled."""
    return _block("vptq_code_block", block, matrix, main, residual, candidates, codes)


def sweep_block(
    aim: Tensor, pull: Tensor, main: Tensor, residual: Tensor | None, candidates: int, codes: tuple
) -> Tensor:
    """:func:`quantize.columns.sweep_block_torch`, compiled."""
    return _block("vptq_sweep_block", aim, pull, main, residual, candidates, codes)


@dataclass(frozen=True)
class Columns:
    """Columns of a layer with books of their own, on a GPU: what :func:`decode` and :func:`pull` take.

    Indices int32 ``[R, C]`` into ``book [k, v]`` and ``residual [r, v]``, float32; column j is column ``where[j]`` of
    the weight (int32), or j without; ``scale`` and ``shift [in_features]``, float32, are by columns of the weight.
    """

    index: Tensor
    residual_index: Tensor | None
    book: Tensor
    residual: Tensor | None
    where: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def arguments(self, weight: Tensor) -> tuple[Argument, ...]:
        """As the functions take them, with the shape and the type of the weight or of its gradient."""
        assert weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()
        books = (self.book, self.residual, self.where, self.scale, self.shift)
        for tensor in (self.index, self.residual_index, *books):
            assert tensor is None or (tensor.dtype in (torch.float32, torch.int32) and tensor.is_contiguous())
        shape = (int(weight.dtype == torch.bfloat16), *weight.shape)
        return self.book.shape[1], self.index, self.residual_index, *self.index.shape, *books, *shape


def decode(columns: Columns, weight: Tensor) -> None:
    """Writes the columns of ``weight [out_features, in_features]``, float32 or bfloat16."""
    _call("coded", "vptq_decode", *columns.arguments(weight), weight, *_place(weight))


def pull(columns: Columns, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the columns' vectors, float32 ``[R C, v]``, from that of the weight, and with a norm ``[2, C]``.

    The latter are those of scale and shift, in the columns' order.
    """
    rows, count = columns.index.shape
    vectors = columns.book.new_empty(rows * count, columns.book.shape[1])
    sums = None if columns.scale is None else columns.book.new_empty(-(-rows // _PULLED_ROWS), 2, count)
    _call("coded", "vptq_pull", *columns.arguments(gradient), gradient, vectors, sums, *_place(gradient))
    return vectors, None if sums is None else sums.sum(0)


def sum_pieces(rows: Tensor, order: Tensor | None, bounds: Tensor) -> Tensor:
    """Sums ``[n, w]`` of rows ``[., w]``, float32: sum p of those from ``bounds[p]`` to ``bounds[p + 1]``, int32.

    Rows are taken in ``order``, int32, if there is one.
    """
    assert rows.dtype == torch.float32
    sums = rows.new_empty(len(bounds) - 1, rows.shape[1])
    _call("coded", "vptq_sum_pieces", rows.contiguous(), rows.shape[1], order, bounds, len(sums), sums, *_place(rows))
    return sums


def _block(
    function: str, block: Tensor, matrix: Tensor, main: Tensor, residual: Tensor | None, candidates: int, codes: tuple
) -> Tensor:
    result = torch.empty_like(block)
    books, count = _books(main, residual), _candidates(main, residual, candidates)
    if block.device.type == "cuda":
        block = block.clone()  # which the GPU's changes as it goes
    scratch = _scratch(block, block.shape[1], count, residual)
    _call("assign", function, block, *block.shape, matrix, matrix.stride(0), *books, count, *codes, result, *scratch)
    return result


def _books(main: Tensor, residual: Tensor | None) -> tuple[Argument, ...]:
    # The tensors must outlive the call: the caller's tuple holds them.
    second = None if residual is None else residual.contiguous()
    return main.contiguous(), len(main), second, 0 if second is None else len(second)


def _candidates(main: Tensor, residual: Tensor | None, candidates: int) -> int:
    return 1 if residual is None else min(candidates, len(main))


def _scratch(like: Tensor, points: int, candidates: int, residual: Tensor | None) -> tuple[Argument, ...]:
    """What the GPU's functions take besides: scratch space, the device and its stream."""
    if like.device.type == "cpu":
        return ()
    keys = torch.empty(2 * candidates * points, dtype=torch.int64, device=like.device)
    left = None if residual is None else like.new_empty(candidates * points * like.shape[-1])
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    return keys, left, processors, *_place(like)


def _place(like: Tensor) -> tuple[Argument, ...]:
    """A GPU and its stream."""
    return like.device.index or 0, torch.cuda.current_stream(like.device).cuda_stream


def _call(name: str, function: str, *arguments: Argument) -> None:
    """Calls a library's function with tensors as pointers and integers as 64-bit registers."""
    first = next(a for a in arguments if isinstance(a, Tensor))
    library = cpu_library(name) if first.device.type == "cpu" else _cuda(name)
    values = [
        ctypes.c_void_p(a.data_ptr() if isinstance(a, Tensor) else None)
        if a is None or isinstance(a, Tensor)
        else ctypes.c_int64(a)
        for a in arguments
    ]
    if code := getattr(library, function)(*values):
        if first.device.type == "cpu" or code < 0:
            raise ValueError("the vector length must be 2 to 16")
        raise RuntimeError(f"{function}: CUDA error {code}")


@cache
def _cuda(name: str) -> ctypes.CDLL | None:
    try:
        return cuda_library(name)
    except BuildError as error:
        what = "searching for centroids" if name == "assign" else "sums by index and training"
        logger.warning("%s with torch alone, several times slower: %s", what, error)
        return None
