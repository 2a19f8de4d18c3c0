"""The ops of the CUDA kernels: ``vllm_vptq::lookup_linear`` and what prepares a layer for it.

The implementations are in csrc/bindings.cpp and are registered when ``build.cuda_extension`` has loaded the library;
this file defines the ops, so that they exist, with their fakes, wherever torch does.

Ops take the *name* of a layer's plan: some hundred numbers would be constants of every node of a compiled graph, which
takes seconds to trace and compile, and be read again at every call. A name has the layer's sizes and a digest, the
same in every process, so a cached graph finds the plans of the layers that were laid out before it runs.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_vptq.layouts import work as jobs

_library = torch.library.Library("vllm_vptq", "FRAGMENT")

_DEFINITIONS = (
    "keep_plan(str name, int[] plan) -> ()",
    "lookup_linear(Tensor x, Tensor codes, Tensor books, Tensor? norm, Tensor? columns, Tensor? dense, Tensor? bias, "
    "Tensor work, str plan) -> Tensor",
    "lookup_weight(Tensor codes, Tensor books, Tensor? norm, Tensor? columns, Tensor? dense, Tensor work, str plan)"
    " -> Tensor",
    "pack_sliced(Tensor words, int columns, int bits, int shift, int width, int slice_bits, int slices, int tiles)"
    " -> (Tensor, Tensor)",
    "pack_resident(Tensor words, int columns, int bits, int shift, int width, int res_shift, int res_width, int kind, "
    "int loads, int book_rows, int copies, int vector_width) -> Tensor",
)


def name_of(plan: Sequence[int]) -> str:
    """The name by which ops find a plan, which is kept for good; once ``build.cuda_extension`` has loaded them."""
    digest = hashlib.sha256(array("q", plan).tobytes()).hexdigest()[:16]
    name = f"{jobs.out_features(plan)}x{jobs.in_features(plan)}-{digest}"
    if torch._C._dispatch_has_kernel_for_dispatch_key("vllm_vptq::keep_plan", "CompositeExplicitAutograd"):
        torch.ops.vllm_vptq.keep_plan(name, plan)
    return name


def lookup_linear(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    work: Tensor,
    bias: Tensor | None,
    plan: str,
) -> Tensor:
    """``y [..., out_features]`` of ``x [..., in_features]`` (float16 or bfloat16) through a layer on a GPU.

    The tensors are those of ``layouts.work.LookupLayout``, ``plan`` the name of its plan (``name_of``); ``bias`` is
    ``[out_features]`` or None. RuntimeError for a name of no plan that this process has seen.
    """
    return torch.ops.vllm_vptq.lookup_linear(x, codes, books, norm, columns, dense, bias, work, plan)


def lookup_weight(
    codes: Tensor,
    books: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    work: Tensor,
    plan: str,
) -> Tensor:
    """The dense weight ``[out_features, in_features]`` of a layer, in the dtype of its books."""
    return torch.ops.vllm_vptq.lookup_weight(codes, books, norm, columns, dense, work, plan)


def _sizes(plan: str) -> tuple[int, int]:
    """Outputs and inputs of the layer that a plan is of."""
    out_features, _, in_features = plan.partition("-")[0].partition("x")
    return int(out_features), int(in_features)


# The last argument of the ops that use a layer is the name of its plan.
def _fake_product(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _sizes(rest[-1])[0])


def _fake_weight(codes: Tensor, books: Tensor, *rest: Any) -> Tensor:
    return books.new_empty(_sizes(rest[-1]))


# An op can be defined once in a process, and a module be imported twice.
if not hasattr(torch.ops.vllm_vptq, "lookup_linear"):
    for definition in _DEFINITIONS:
        _library.define(definition)
    torch.library.register_fake("vllm_vptq::lookup_linear", _fake_product, lib=_library)
    torch.library.register_fake("vllm_vptq::lookup_weight", _fake_weight, lib=_library)
