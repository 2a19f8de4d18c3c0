"""Second moments of what a block's linears receive, stage by stage, optionally weighted by what the end loss feels.

A stage is a set of linears that receive one tensor (q, k and v). Stages are collected in the order in which the block
runs, each on what the coded layers before it give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from quantize.devices import repeatable_gradients, streamed
from quantize.errors import QuantizeError
from quantize.hessian import SecondMoment
from quantize.model import Batch, Block, Stop

Weights = Mapping[str, Tensor]
"""For every linear, a weight for every token and group of output rows: float32 ``[tokens, G]``."""


@torch.inference_mode()
def stages(i: int, block: Block, names: Sequence[str], batches: Sequence[Batch]) -> list[list[str]]:
    """The linears among ``names`` in the order of their first call, those that receive the same tensor together.

    Later batches are for linears that those before did not reach. What none of them reached is missing.
    """
    found: list[list[str]] = []
    last: list[Tensor] = []
    left = dict.fromkeys(names)

    def record(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name not in left:
            return
        del left[name]
        if last and last[0] is args[0]:
            found[-1].append(name)
        else:
            found.append([name])
        last[:] = [args[0]]

    hooks = [block.linears[name].register_forward_pre_hook(partial(record, name)) for name in names]
    for batch in batches:
        if left:
            batch.run(i, block.module)
            last.clear()
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def collect(
    i: int, block: Block, stage: Sequence[str], batches: Sequence[Batch], weights: Weights | None = None
) -> dict[str, Tensor]:
    """Second moments for the linears of one stage: ``[in, in]``, or ``[G, in, in]`` where weights are given."""
    first = block.linears[stage[0]]
    device = first.weight.device
    plain = SecondMoment(first.in_features, device)
    guided = {
        name: [SecondMoment(first.in_features, device) for _ in range(weights[name].shape[1])]
        for name in stage
        if weights is not None
    }

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, first.in_features)
        here = slice(plain.tokens, plain.tokens + len(x))
        if not guided:
            plain.add(x)
            raise Stop
        plain.tokens = here.stop
        x = x.float()
        for name, groups in guided.items():
            assert weights is not None
            for g, moment in enumerate(groups):
                moment.add(x, x * weights[name][here, g, None].to(device))
        raise Stop  # what follows in the block is nobody's business

    hook = first.register_forward_pre_hook(record)
    for batch in batches:
        with contextlib.suppress(Stop):
            batch.run(i, block.module)
    hook.remove()
    try:
        if guided:
            return {name: torch.stack([moment.mean() for moment in groups]) for name, groups in guided.items()}
        return dict.fromkeys(stage, plain.mean())
    except QuantizeError as error:
        raise QuantizeError(f"{stage[0]}: {error}") from error


def output_gradients(
    model: nn.Module, blocks: Sequence[Block], groups: Mapping[str, list[slice]], batches: Sequence[Tensor]
) -> tuple[Weights, dict[str, float]]:
    """What the end loss feels of an error in each linear's output: squared gradients, mean over each group of rows.

    ``groups`` names the linears and their groups of output rows; ``batches`` are token ids int64 ``[n, context]``. The
    loss is the next token's negative log likelihood. Returns weights scaled to a mean of one, and the mean they had.
    GuidedQuant (https://arxiv.org/abs/2505.07004).
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in groups}

    def record(name: str, gradient: Tensor) -> None:
        squares = gradient.square()
        seen[name].append(torch.stack([squares[:, rows].mean(1) for rows in groups[name]], 1).cpu())

    back_propagate(model, blocks, list(groups), batches, record, lambda ids, _: ids[:, 1:].flatten())
    weights, means = {}, {}
    for name, parts in seen.items():
        whole = torch.cat(parts) if parts else torch.zeros(0, len(groups[name]))  # a linear that no token reached
        means[name] = float(whole.mean()) if parts else 0.0
        weights[name] = whole / max(means[name], 1e-30)
    return weights, means


def back_propagate(
    model: nn.Module,
    blocks: Sequence[Block],
    names: Sequence[str],
    batches: Sequence[Tensor],
    record: Callable[[str, Tensor], None],
    targets: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Has ``record`` take the end loss's gradients in the named linears' outputs, float32 ``[tokens, out_features]``.

    The loss is the negative log likelihood, summed, of what ``targets`` gives for token ids ``[n, context]`` and logits
    ``[n (context - 1), vocabulary]``: a token for each row of them.
    """

    def taken(name: str, _: nn.Module, __: object, gradients: tuple[Tensor, ...]) -> None:
        record(name, gradients[0].float().flatten(0, -2))

    hooks = [model.get_submodule(name).register_full_backward_hook(partial(taken, name)) for name in names]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    embeddings: nn.Module = model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_()))
    device = batches[0].device
    with streamed(model, [block.module for block in blocks], device), repeatable_gradients(device):
        for ids in batches:
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            nn.functional.cross_entropy(logits, targets(ids, logits.detach()), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    for parameter in trainable:
        parameter.requires_grad_()
