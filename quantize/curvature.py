"""What the end loss feels of errors in several outputs of a linear at once, by which its output rows are coupled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quantize.model import Block
from quantize.moments import back_propagate

CURVATURE_TOKENS = 131072
"""Calibration tokens that it is taken of, at most: more would hardly change what is left of it."""
_WIDEST = 2
"""Output features per input feature. A layer beyond it fans out (gate, up): gradients of its outputs hardly go
together, so that what a calibration text shows of that is noise, and ``G`` would be large."""


def coupled(shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """The linears, of ``[out_features, in_features]``, whose rows are worth coupling."""
    return [name for name, (out, columns) in shapes.items() if out <= _WIDEST * columns]


def curvatures(
    model: nn.Module, blocks: Sequence[Block], names: Sequence[str], batches: Sequence[Tensor], seed: int
) -> dict[str, Tensor]:
    """``G = E[g g^T]`` of every named linear, :func:`shrunk`, float32 ``[out_features, out_features]`` on the CPU.

    g is the gradient of the end loss in its output, over tokens; ``batches`` are token ids int64 ``[n, context]``. The
    loss is the negative log likelihood of a token that the model itself draws, so that this is a factor of its Fisher
    information, the curvature of the divergence from it. Linears that no token reached are missing.
    """
    found: dict[str, Tensor] = {}
    fourth: dict[str, Tensor] = {}
    generator = torch.Generator(batches[0].device).manual_seed(seed)

    def record(name: str, gradient: Tensor) -> None:
        if name not in found:
            found[name] = gradient.new_zeros(gradient.shape[1], gradient.shape[1])
            fourth[name] = gradient.new_zeros((), dtype=torch.float64)
        found[name].addmm_(gradient.T, gradient)
        squares = gradient.square()
        fourth[name] += squares.sum(1).double().square().sum() - squares.square().sum(dtype=torch.float64)

    def drawn(_: Tensor, logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    back_propagate(model, blocks, names, batches, record, drawn)
    tokens = sum(ids.numel() for ids in batches)
    return {name: shrunk(matrix / tokens, float(fourth[name]) / tokens, tokens).cpu() for name, matrix in found.items()}


def shrunk(matrix: Tensor, fourth: float, tokens: int) -> Tensor:
    """``G`` of so many tokens, its off-diagonals less by the share of their squares that is the sample's noise.

    ``fourth`` is the mean of ``sum over i != j of (g_i g_j)^2``; what of that is not ``G``'s own is what one token's
    product differs by. (Ledoit and Wolf, https://doi.org/10.1016/S0047-259X(03)00096-4, towards the diagonal.)
    """
    apart = matrix - matrix.diagonal().diag()
    energy = float(apart.double().square().sum())
    noise = (fourth - energy) / tokens
    return matrix - min(1.0, max(0.0, noise / energy)) * apart if energy else matrix
