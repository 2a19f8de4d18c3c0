"""Targets that make up for the layers before, after which inputs are not what the weights were made for.

With x what the original's prefix gives a linear and y what the coded one does, the best any weight can do is not
``Q = W`` but the minimum of ``E |W x - Q y|^2``, ``W + W E[(x - y) y^T] E[y y^T]^-1``: quantization error propagation
(QEP, https://arxiv.org/abs/2504.09629; GPTAQ, https://arxiv.org/abs/2504.02692, has the same aim). Where the output is
added to a residual stream, r in the original and s after the coded prefix, what that has lost can be made up for, too:
the minimum of ``E |W x + r - Q y - s|^2`` has ``E[(r - s) y^T] E[y y^T]^-1`` in addition (LoaQ,
https://arxiv.org/abs/2509.06297). There tokens count by the inverse square of their ``W x + r``, which a norm divides
by before anything reads it: the first tokens of many models are a thousand times as large as others. It is rounded to a
power of two, with which tokens keep every bit. A share below one goes part of the way, because the expectations are
those of a calibration text.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantize.errors import QuantizeError
from quantize.hessian import SecondMoment, add_products, damp
from quantize.model import Batch, Block, Stop

_DAMPING = 0.01
_DAMPING_STEPS = 8
_TINY = 1e-30


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


@dataclass(frozen=True)
class Drift:
    """What a linear of ``[out_features, in_features]`` receives after the coded prefix, beside what it did; float32."""

    inputs: Tensor
    """``E[(x - y) y^T]``, ``[in_features, in_features]``."""
    moment: Tensor
    """``E[y y^T]``, ``[in_features, in_features]``."""
    residual: Tensor | None = None
    """``E[(r - s) y^T]``, ``[out_features, in_features]``; None where the output is not added to a residual stream.

    With one, all three are weighted means over tokens.
    """


@torch.inference_mode()
def drift(i: int, block: Block, twin: nn.Module, linear: str, batches: Sequence[Batch], original: Original) -> Drift:
    """How far the inputs of a linear of block i, and the residual stream that its output is added to, have drifted.

    The linear goes by its full name; ``twin`` is the block as it was. Routed experts have no drift here: which tokens
    they get depends on the prefix.
    """
    local = linear.removeprefix(f"{block.name}.")
    coded, before = block.linears[linear], twin.get_submodule(local)
    stream = residual_stream(i, twin, local, original.batches[0])
    moment = SecondMoment(coded.in_features, coded.weight.device)
    cross = torch.zeros(coded.in_features, coded.in_features, device=coded.weight.device)  # E[x y^T]
    residual = None if stream is None else torch.zeros(coded.weight.shape, device=coded.weight.device)
    total, expert = 0.0, False
    for batch, reference in zip(batches, original.batches, strict=True):
        y, s = _received(i, block.module, local, stream, batch)
        expert = expert or len(y) != batch.hidden[..., 0].numel()  # which the coded prefix may route other tokens to
        if expert:
            moment.add(y)
            continue
        x, r = _received(i, twin, local, stream, reference)
        weighted = y
        if residual is not None:
            weight = _power_of_two(1 / (r + before(x)).float().square().mean(-1).clamp_min(_TINY))
            weighted = y.float() if y.dtype == torch.float16 else y  # float16 holds too few powers of two
            weighted = weighted * weight[:, None].to(weighted.dtype)
            add_products(residual, r - s, weighted)
        moment.add(y, weighted)
        add_products(cross, x, weighted)
        total += len(y) if residual is None else float(weight.sum())
    try:
        if expert:
            mean = moment.mean()
            return Drift(torch.zeros_like(mean), mean)
        mean = moment.mean(total)
    except QuantizeError as error:
        raise QuantizeError(f"{linear}: {error}") from error
    return Drift(cross.div_(total).sub_(mean), mean, None if residual is None else residual / total)


def _power_of_two(weight: Tensor) -> Tensor:
    """The powers of two that are nearest, by ratio, to positive float32 numbers."""
    return ((weight * 2**0.5).view(torch.int32) & 0x7F800000).view(torch.float32)


@torch.inference_mode()
def residual_stream(i: int, module: nn.Module, linear: str, batch: Batch) -> str | None:
    """Where block i has the residual stream that a linear's output is added to, unscaled; None if it is added to none.

    That is, the module whose input it is, by its name in the block: "" is the block itself. Found by looking: with one
    such input and the linear's output a sum, bit for bit, that a later module of the block receives or the block gives.
    """
    inputs: list[tuple[str, Tensor]] = []
    outputs: list[tuple[int, Tensor]] = []

    def receive(name: str, _: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.append((name, args[0]))

    hooks = [part.register_forward_pre_hook(partial(receive, name)) for name, part in module.named_modules()]
    writer = module.get_submodule(linear)
    hooks.append(writer.register_forward_hook(lambda _, __, output: outputs.append((len(inputs), output))))
    result = batch.run(i, module)
    for hook in hooks:
        hook.remove()
    if len(outputs) != 1:
        return None
    position, output = outputs[0]
    sums = [tensor for _, tensor in inputs[position:]] + [result]
    for name, stream in inputs[:position]:
        if stream.shape == output.shape and any(torch.equal(stream + output, found) for found in sums):
            return name
    return None


def _received(i: int, module: nn.Module, linear: str, stream: str | None, batch: Batch) -> tuple[Tensor, Tensor]:
    """What a linear receives, and the residual stream or, if it has none, the same: ``[tokens, features]``."""
    seen: dict[str, Tensor] = {}

    def record(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].flatten(0, -2)
        if name == linear:
            raise Stop

    source = linear if stream is None else stream
    names = dict.fromkeys((source, linear))
    hooks = [module.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in names]
    with contextlib.suppress(Stop):
        batch.run(i, module)
    for hook in hooks:
        hook.remove()
    empty = torch.empty(0, module.get_submodule(linear).in_features, device=batch.hidden.device)
    return seen.get(linear, empty), seen.get(source, empty)


def corrected(weight: Tensor, drift: Drift, share: float) -> Tensor:
    """The weight ``[out_features, in_features]`` in float32, moved by ``share`` to the best for what has drifted."""
    missed = weight.float() @ drift.inputs
    if drift.residual is not None:
        missed += drift.residual
    damping = _DAMPING
    for _ in range(_DAMPING_STEPS):
        lower, failed = torch.linalg.cholesky_ex(damp(drift.moment, damping)[0])
        if not failed:
            return weight.float() + share * torch.cholesky_solve(missed.T, lower).T
        damping *= 4
    return weight.float()
