"""The ops of the CUDA kernels: ``vllm_vptq::lookup_linear`` and what prepares a layer for it.

The implementations are in csrc/bindings.cpp and are registered when ``build.cuda_extension`` has loaded the library;
this file defines the ops, so that they exist, with their fakes, wherever torch does. ``lookup_by_count`` chooses
between two layouts of a layer; an op of its own, because the count is symbolic under torch.compile.
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
    "lookup_by_count(Tensor x, Tensor codes, Tensor books, Tensor work, Tensor stream_codes, Tensor stream_books, "
    "Tensor stream_work, Tensor? norm, Tensor? columns, Tensor? dense, Tensor? bias, int[] plan, int[] stream_plan)"
    " -> Tensor",
    "pack_sliced(Tensor words, int columns, int bits, int shift, int width, int slices, int tiles) -> (Tensor, Tensor)",
    "pack_resident(Tensor words, int columns, int bits, int shift, int width, int res_shift, int res_width, int kind, "
    "int loads, int book_rows, int copies) -> Tensor",
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


def lookup_by_count(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    work: Tensor,
    stream_codes: Tensor,
    stream_books: Tensor,
    stream_work: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    plan: Sequence[int],
    stream_plan: Sequence[int],
) -> Tensor:
    """``lookup_linear``: by ``plan`` for as many tokens as that says, by ``stream_plan`` for more.

    The tensors are those of ``layouts.paired.PairedLayout``.
    """
    few, many = (codes, books, work), (stream_codes, stream_books, stream_work)
    return torch.ops.vllm_vptq.lookup_by_count(x, *few, *many, norm, columns, dense, bias, plan, stream_plan)


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


def _by_count(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    work: Tensor,
    stream_codes: Tensor,
    stream_books: Tensor,
    stream_work: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    plan: Sequence[int],
    stream_plan: Sequence[int],
) -> Tensor:
    if x.shape[:-1].numel() <= jobs.direct_tokens(plan):
        return lookup_linear(x, codes, books, norm, columns, dense, work, bias, plan)
    return lookup_linear(x, stream_codes, stream_books, norm, columns, dense, stream_work, bias, stream_plan)


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
    torch.library.register_fake("vllm_vptq::lookup_by_count", _fake_product, lib=_library)
    _library.impl("lookup_by_count", _by_count, "CUDA")
