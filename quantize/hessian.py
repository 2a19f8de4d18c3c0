"""Second moments of a layer's inputs, and the factor of their inverse that error feedback walks along."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.errors import QuantizeError

_DAMPING_STEPS = 8


class SecondMoment:
    """Accumulates ``H = E[x x^T]`` over tokens, float32 ``[in_features, in_features]``."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor, weighted: Tensor | None = None) -> None:
        """Adds tokens ``[..., in_features]``; ``weighted`` are the same, each times its weight if it is not one."""
        flat = x.reshape(-1, x.shape[-1])
        add_products(self._sum, flat, flat if weighted is None else weighted)
        self.tokens += flat.shape[0]

    def mean(self, weights: float | None = None) -> Tensor:
        """H, of ``weights`` in all; QuantizeError if the calibration never reached this layer or was not finite."""
        if not self.tokens:
            raise QuantizeError("no calibration token reached this layer")
        moment = self._sum / (self.tokens if weights is None else weights)
        if not bool(torch.isfinite(moment).all()):
            raise QuantizeError("its inputs on the calibration text are not finite")
        return moment


def add_products(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds ``x^T y`` of tokens ``[n, a]`` and ``[n, b]`` to ``total``, float32 ``[a, b]``.

    A GPU multiplies tokens of 16 bits as they are, which is exact, and adds up in float32, too, but faster.
    """
    if x.is_cuda and x.dtype == y.dtype and x.itemsize == 2:
        total += torch.mm(x.T, y, out_dtype=torch.float32)
    else:
        total.addmm_(x.T.float(), y.float())


def damp(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Makes H safe to invert: ``damping`` times the mean diagonal is added to it.

    Returns the damped H and the dead columns (bool ``[in_features]``): inputs that were always zero, whose weights
    the calibration says nothing about; their diagonal becomes the mean, so that they are coded plainly.
    """
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = moment.clone()
    damped.diagonal().add_(torch.where(dead, mean, damping * mean))
    return damped, dead


def inverse_factor(moment: Tensor) -> Tensor:
    """Upper triangular U with ``H^-1 = U^T U`` (GPTQ, https://arxiv.org/abs/2210.17323).

    ``U[j, j+1:] / U[j, j]`` tells how the error made in column j is best spread over the columns after it. Where H is
    not positive definite in float32, more damping is added step by step.
    """
    mean = moment.diagonal().mean()
    extra = 0.0
    for step in range(_DAMPING_STEPS):
        damped = moment
        if extra:
            damped = moment.clone()
            damped.diagonal().add_(extra * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower, damped  # of 70B models they hold 3 GiB each
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                del inverse
                return upper.contiguous()
        extra = 0.01 * 4.0**step
    raise QuantizeError("the second moments of its inputs have no Cholesky factor, however much they are damped")
