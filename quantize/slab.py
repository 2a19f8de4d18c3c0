"""What a layer's loss is made of: columns, the second moments of their inputs, and which output rows go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.hessian import damp, inverse_factor

_GROUPS = 8
"""Groups of output rows coded one after another; 32, or one for every vector, are predicted to gain no more."""


@dataclass(frozen=True)
class Coupling:
    """Output rows that the end loss feels together: the factor ``G`` of its curvature, as ``H`` is that of the inputs.

    With g the gradient of the end loss in a linear's output, ``G = E[g g^T]``, and an error E in its weight costs about
    ``tr(G E H E^T)`` (K-FAC, https://arxiv.org/abs/1503.05671). ``matrix [rows, rows]`` is damped, of mean diagonal 1,
    and ``order`` sorts rows into ``groups``, ranges of it; ``factor`` is upper triangular in that order.
    """

    matrix: Tensor
    order: Tensor
    groups: list[slice]
    factor: Tensor

    @classmethod
    def of(cls, matrix: Tensor, damping: float, unit: int) -> Coupling:
        """From ``G``, damped as H is; ``unit`` rows, vectors and no halves of them, stay together.

        Groups take every eighth unit: neighbours, of one attention head, are what is coupled most, and inside of a
        group nothing is made up for.
        """
        damped = damp(matrix.float(), damping)[0]
        damped /= damped.diagonal().mean()
        rows = torch.arange(len(damped), device=damped.device)
        whole = rows[: len(rows) // unit * unit].view(-1, unit)
        count = max(1, min(_GROUPS, len(whole)))
        parts = [whole[i::count].flatten() for i in range(count)]
        parts[-1] = torch.cat([parts[-1], rows[whole.numel() :]])  # what fills no vector is the last one's
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        order = torch.cat(parts)
        return cls(damped, order, groups, inverse_factor(damped[order][:, order]))

    def row_weights(self) -> Tensor:
        """What an error costs in each row once later groups have made up for it: float32 ``[rows]``."""
        weights = torch.empty(len(self.matrix), device=self.matrix.device)
        for group in self.groups:
            factor = self.factor[group, group]
            inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), device=factor.device), upper=True)
            weights[self.order[group]] = inverse.square().sum(1)
        return weights


@dataclass(frozen=True)
class Slab:
    """Output rows with one matrix of second moments: target ``[C, rows]`` and moment ``[C, C]``, float32.

    Their loss is ``tr(E^T H E)`` with ``E [C, rows]`` the error, or ``tr(G E^T H E)`` where rows are coupled.
    """

    target: Tensor
    moment: Tensor
    coupling: Coupling | None = None

    def pull(self, error: Tensor) -> Tensor:
        """Half the gradient of the loss in an error ``[C, rows]``: ``H E G``."""
        pulled = self.moment @ error
        return pulled if self.coupling is None else pulled @ self.coupling.matrix

    def mass(self) -> Tensor:
        """The loss's curvature in each weight alone, ``[C, rows]``: the diagonals of H and G multiplied."""
        diagonal = self.moment.diagonal()[:, None].expand_as(self.target)
        return diagonal if self.coupling is None else diagonal * self.coupling.matrix.diagonal()

    def loss(self, error: Tensor) -> float:
        """Of an error ``[C, rows]``."""
        return float((self.pull(error) * error).sum())
