"""The ops of the CUDA kernels: ``vllm_vptq::lookup_linear`` and what prepares a layer for it.

The implementations are in csrc/bindings.cpp and are registered when ``build.cuda_extension`` has loaded the library;
this file defines the ops, so that they exist, with their fakes, wherever torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_vptq.layouts import work as jobs

_library = torch.library.Library("vllm_vptq", "FRAGMENT")

_DEFINITIONS = (
    "lookup_linear(Tensor x, Tensor codes, Tensor books, Tensor? norm, Tensor? columns, Tensor? dense, Tensor? bias, "
    "Tensor work, int[] plan) -> Tensor",
    "lookup_weight(Tensor codes, Tensor books, Tensor? norm, Tensor? columns, Tensor? dense, Tensor work, int[] plan)"
    " -> Tensor",
    "pack_sliced(Tensor words, int columns, int bits, int shift, int width, int slice_bits, int slices, int tiles)"
    " -> (Tensor, Tensor)",
    "pack_resident(Tensor words, int columns, int bits, int shift, int width, int res_shift, int res_width, int kind, "
    "int loads, int book_rows, int copies, int vector_width) -> Tensor",
)


def lookup_linear(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    work: Tensor,
    bias: Tensor | None,
    plan: Sequence[int],
) -> Tensor:
    """``y [..., out_features]`` of ``x [..., in_features]`` (float16 or bfloat16) through a layer on a GPU.

    The tensors and ``plan`` are those of ``layouts.work.LookupLayout``; ``bias`` is ``[out_features]`` or None.
    """
    return torch.ops.vllm_vptq.lookup_linear(x, codes, books, norm, columns, dense, bias, work, plan)


def lookup_weight(
    codes: Tensor,
    books: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    work: Tensor,
    plan: Sequence[int],
) -> Tensor:
    """The dense weight ``[out_features, in_features]`` of a layer, in the dtype of its books."""
    return torch.ops.vllm_vptq.lookup_weight(codes, books, norm, columns, dense, work, plan)


# The last argument of the ops that use a layer is a plan.
def _fake_product(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], jobs.out_features(rest[-1]))


def _fake_weight(codes: Tensor, books: Tensor, *rest: Any) -> Tensor:
    return books.new_empty(jobs.out_features(rest[-1]), jobs.in_features(rest[-1]))


# An op can be defined once in a process, and a module be imported twice.
if not hasattr(torch.ops.vllm_vptq, "lookup_linear"):
    for definition in _DEFINITIONS:
        _library.define(definition)
    torch.library.register_fake("vllm_vptq::lookup_linear", _fake_product, lib=_library)
    torch.library.register_fake("vllm_vptq::lookup_weight", _fake_weight, lib=_library)
