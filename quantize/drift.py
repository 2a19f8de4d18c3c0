"""Targets that make up for the layers before, after which inputs are not what the weights were made for.

With x what the original's prefix gives a linear and y what the coded one does, the best any weight can do is not
``Q = W`` but the minimum of ``E |W x - Q y|^2``, ``W + W E[(x - y) y^T] E[y y^T]^-1``: quantization error propagation
(QEP, https://arxiv.org/abs/2504.09629; GPTAQ, https://arxiv.org/abs/2504.02692, has the same aim). A share below one
goes part of the way, because the expectations are those of a calibration text.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from quantize.errors import QuantizeError
from quantize.hessian import SecondMoment, damp
from quantize.model import Batch, Block, Stop

_DAMPING = 0.01
_DAMPING_STEPS = 8


class Original:
    """The original's activations on their way, beside those of the coded prefix."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        # Where the others are: what waits in the host's memory stays pinned.
        copies = [torch.empty_like(b.hidden, pin_memory=b.hidden.is_pinned()).copy_(b.hidden) for b in batches]
        self.batches = [Batch(copied, b.arguments) for copied, b in zip(copies, batches, strict=True)]

    @contextlib.contextmanager
    def beside(self, i: int, block: Block) -> Iterator[nn.Module]:
        """A copy of block i as it is now; afterwards the activations have gone through it."""
        twin = copy.deepcopy(block.module)
        yield twin
        with torch.inference_mode():
            for batch in self.batches:
                batch.keep(batch.run(i, twin))


@torch.inference_mode()
def drift(
    i: int, block: Block, twin: nn.Module, linear: str, batches: Sequence[Batch], original: Original
) -> tuple[Tensor, Tensor]:
    """``E[(x - y) y^T]`` and ``E[y y^T]``, float32 ``[in_features, in_features]``, of a linear of block i.

    The linear goes by its full name; ``twin`` is the block as it was. Routed experts have no drift here: which tokens
    they get depends on the prefix.
    """
    coded, before = block.linears[linear], twin.get_submodule(linear.removeprefix(f"{block.name}."))
    moment = SecondMoment(coded.in_features, coded.weight.device)
    cross = torch.zeros(coded.in_features, coded.in_features, device=coded.weight.device)
    paired = 0
    for batch, reference in zip(batches, original.batches, strict=True):
        y = _input(i, block.module, coded, batch)
        moment.add(y)
        if len(y) != batch.hidden[..., 0].numel():
            continue  # an expert, which the coded prefix may route other tokens to
        cross.addmm_((_input(i, twin, before, reference) - y).T, y)
        paired += len(y)
    try:
        return cross / max(paired, 1), moment.mean()
    except QuantizeError as error:
        raise QuantizeError(f"{linear}: {error}") from error


def _input(i: int, module: nn.Module, linear: nn.Linear, batch: Batch) -> Tensor:
    """What a linear of a block receives: float32 ``[tokens, in_features]``."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, -2).float())
        raise Stop

    hook = linear.register_forward_pre_hook(record)
    with contextlib.suppress(Stop):
        batch.run(i, module)
    hook.remove()
    return seen[0] if seen else torch.empty(0, linear.in_features, device=linear.weight.device)


def corrected(weight: Tensor, cross: Tensor, moment: Tensor, share: float) -> Tensor:
    """The weight ``[out_features, in_features]`` in float32, moved by ``share`` to the best for drifted inputs."""
    damping = _DAMPING
    for _ in range(_DAMPING_STEPS):
        lower, failed = torch.linalg.cholesky_ex(damp(moment, damping)[0])
        if not failed:
            return weight.float() + share * torch.cholesky_solve((weight.float() @ cross).T, lower).T
        damping *= 4
    return weight.float()
