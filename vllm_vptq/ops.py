"""The one op of a layer, ``vllm_vptq::linear``, with its fake and its choice of an implementation.

One call computes a whole fused layer (q, k and v; gate and up), so that a compiled graph holds one node per layer:
one call of a function on a CPU, two launches or more on a GPU. The choice by token count belongs inside, because the
count is symbolic under torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vptq import cpu, reference
from vllm_vptq.layouts.plan import decode

ALLOW_REFERENCE = "VLLM_VPTQ_ALLOW_REFERENCE"
_library = torch.library.Library("vllm_vptq", "FRAGMENT")


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
    """``y [..., out_features]`` of ``x [..., in_features]`` through a layer in the compact layout, in x's dtype.

    The tensors and ``plan`` are those of ``layouts.compact.CompactLayout``; ``bias`` is ``[out_features]`` or None.
    """
    return torch.ops.vllm_vptq.linear(x, qweight, codebooks, norm, columns, dense, bias, plan)


def _fake(
    x: Tensor,
    qweight: Tensor,
    codebooks: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    plan: Sequence[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], reference.out_features(decode(plan)))


def _cpu(
    x: Tensor,
    qweight: Tensor,
    codebooks: Tensor,
    norm: Tensor | None,
    columns: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    plan: Sequence[int],
) -> Tensor:
    native = cpu.available() and cpu.supports(x, codebooks, bias)
    return (cpu if native else reference).linear(x, qweight, codebooks, norm, columns, dense, bias, plan)


# An op can be defined once in a process, and a module be imported twice.
if not hasattr(torch.ops.vllm_vptq, "linear"):
    _library.define(
        "linear(Tensor x, Tensor qweight, Tensor codebooks, Tensor? norm, Tensor? columns, Tensor? dense, "
        "Tensor? bias, int[] plan) -> Tensor"
    )
    _library.impl("linear", _cpu, "CPU")
    _library.impl("linear", reference.linear, "CUDA")
    torch.library.register_fake("vllm_vptq::linear", _fake, lib=_library)
