"""The native CPU kernels, ``csrc/cpu/linear.cpp``, behind the signature of the op: float32, float16 and bfloat16."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from vllm_vptq.build import BuildError, cpu_library
from vllm_vptq.layouts.plan import decode
from vllm_vptq.reference import check_shapes, in_features, out_features

INSTRUCTION_SET = "VLLM_VPTQ_CPU_ISA"
"""Environment variable: one of INSTRUCTION_SETS, to use less than the processor has."""
INSTRUCTION_SETS = ("portable", "avx2", "avx512")

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# A child of vLLM's logger: its level and handler apply without importing vLLM.
logger = logging.getLogger("vllm.vptq")


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
    """The arguments and the result of ``ops.linear``, where :func:`available` and :func:`supports` say so."""
    numbers, inputs, rows = _prepared(tuple(plan))
    check_shapes(x, bias, inputs, rows)
    x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    width = x.shape[-1]
    failed = _library().vptq_linear(
        numbers,
        len(numbers),
        x.data_ptr(),
        _DTYPES[x.dtype],
        y.numel() // rows,
        width,
        qweight.data_ptr(),
        codebooks.data_ptr(),
        codebooks.numel(),
        _DTYPES[codebooks.dtype],
        None if norm is None else norm.data_ptr(),
        None if columns is None else columns.data_ptr(),
        None if dense is None else dense.data_ptr(),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else _DTYPES[bias.dtype],
        y.data_ptr(),
        rows,
        instruction_set(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {y.numel() // rows} tokens of {width} float32 inputs")
    return y


def supports(x: Tensor, codebooks: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels know the dtypes."""
    return x.dtype in _DTYPES and codebooks.dtype in _DTYPES and (bias is None or bias.dtype in _DTYPES)


@cache
def available() -> bool:
    """Whether the kernels are there or could be built; if not, says so once and what to do about it."""
    try:
        _library()
    except (BuildError, OSError) as error:
        logger.warning("VPTQ layers run in torch, many times slower than in the native CPU kernels: %s", error)
        return False
    return True


@cache
def instruction_set() -> int:
    """The index in INSTRUCTION_SETS of what the kernels use: $VLLM_VPTQ_CPU_ISA, or else the widest there is."""
    widest = int(_library().vptq_widest())
    asked = os.environ.get(INSTRUCTION_SET) or INSTRUCTION_SETS[widest]
    if asked not in INSTRUCTION_SETS[: widest + 1]:
        raise RuntimeError(f"{INSTRUCTION_SET}={asked}, expected {' or '.join(INSTRUCTION_SETS[: widest + 1])}")
    return INSTRUCTION_SETS.index(asked)


@cache
def _library() -> ctypes.CDLL:
    library = cpu_library("linear")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.vptq_widest.restype = number
    library.vptq_linear.argtypes = [
        *(pointer, number),  # plan
        *(pointer, number, number, number),  # x, its dtype and shape
        *(pointer, pointer, number, number),  # qweight; codebooks, their size and dtype
        *(pointer, pointer, pointer),  # norm, columns, dense
        *(pointer, number),  # bias and its dtype
        *(pointer, number),  # y and its width
        *(number, number),  # instruction set, threads
    ]
    return library


@lru_cache(maxsize=4096)
def _prepared(plan: tuple[int, ...]) -> tuple[ctypes.Array[ctypes.c_int64], int | None, int]:
    """A plan as C takes it, and the widths of its input, if it says, and of its output."""
    modules = decode(plan)
    return (ctypes.c_int64 * len(plan))(*plan), in_features(modules), out_features(modules)
