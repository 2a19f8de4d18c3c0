"""Fine-tuning: books, column norms and the model's own norms are trained towards the original; indices stay.

End to end, the loss is the Kullback-Leibler divergence of the next token's distribution from the original model's;
for a block, the error of its output. Adam, with steps relative to the size of what they change, decayed to nothing.
VPTQ's paper has this and never released it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantize.coded import CodedLinear

Progress = Callable[[int, int, float], None]

_PIECE_TOKENS = 2048
_LEAST = 0.1
"""Of the median size, for elements of norms and biases that are close to zero."""


@dataclass
class Training:
    """Parameters on their way, all that is needed to go on after a stop: ``state`` and ``step``.

    ``rate`` is the first step's size relative to what it changes: to a book's root mean square, to every element of
    norms, scales and biases itself. Of those a few can be hundreds of times as large as others: biases of Qwen2.5's
    ``k_proj`` have a median of 0.7 and reach 354.
    """

    parameters: dict[str, nn.Parameter]
    rate: float
    steps: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Of every step so far, end to end."""
    _moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _sizes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            self._moments[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            # A column's shift is small where it can be moved by as much as its scale.
            moved = name.removesuffix("weight_bias") + "weight_scale" if name.endswith("weight_bias") else name
            self._sizes[name] = sizes(self.parameters[moved].detach(), name.endswith("centroids"))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @torch.no_grad()
    def update(self) -> None:
        """One step of Adam (https://arxiv.org/abs/1412.6980) on the gradients, which are cleared.

        All tensors at once: there are hundreds of small ones, and a GPU does a step sooner than it is told of it.
        """
        self.step += 1
        rate = self.rate * (1 + math.cos(math.pi * (self.step - 1) / self.steps)) / 2
        rate *= min(1.0, self.step / (0.05 * self.steps + 1))
        named = [(name, p, p.grad) for name, p in self.parameters.items() if p.grad is not None]
        gradients = [gradient for _, _, gradient in named]
        first, second = (list(moments) for moments in zip(*(self._moments[name] for name, _, _ in named), strict=True))
        torch._foreach_lerp_(first, gradients, 0.1)
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 0.05)
        steps = torch._foreach_div(first, 1 - 0.9**self.step)
        roots = torch._foreach_sqrt(torch._foreach_div(second, 1 - 0.95**self.step))
        torch._foreach_add_(roots, 1e-12)
        torch._foreach_div_(steps, roots)
        torch._foreach_mul_(steps, [self._sizes[name] for name, _, _ in named])
        torch._foreach_mul_(steps, -rate)
        torch._foreach_add_([parameter for _, parameter, _ in named], steps)
        for _, parameter, _ in named:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors by name."""
        state = {f"value:{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, (first, second) in self._moments.items():
            state |= {f"first:{name}": first, f"second:{name}": second}
        return state | {"step": torch.tensor(self.step), "losses": torch.tensor(self.losses, dtype=torch.float64)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from a :meth:`state` of parameters that began as these do: steps are relative to where they began."""
        self.step, self.losses = int(state["step"]), state["losses"].tolist()
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"value:{name}"])
            for moment, kind in zip(self._moments[name], ("first", "second"), strict=True):
                moment.copy_(state[f"{kind}:{name}"])


def sizes(value: Tensor, book: bool) -> Tensor:
    """What steps are relative to, in the shape of ``value``: see :class:`Training`. Small elements can still move."""
    if book:
        return value.square().mean().sqrt().expand_as(value).clone()
    return value.abs().maximum(_LEAST * value.abs().median())


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a module, by name: its coded linears' books and norms, and the weights of its own norms.

    Everything else is frozen. Norm weights become float32 parameters.
    """
    module.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, CodedLinear):
            found |= {f"{prefix}{key}": parameter for key, parameter in part.named_parameters()}
        elif type(part).__name__.endswith("Norm") and isinstance(getattr(part, "weight", None), nn.Parameter):
            part.weight = nn.Parameter(part.weight.detach().float())
            found[f"{prefix}weight"] = part.weight
    for parameter in found.values():
        parameter.requires_grad_()
    return found


def tune_model(
    student: nn.Module,
    teacher: nn.Module,
    batches: list[Tensor],
    training: Training,
    progress: Progress,
    checkpoint: Callable[[Training], None],
) -> None:
    """Trains until ``training.steps``: step i on batch ``i % len(batches)``, token ids int64 ``[n, context]``.

    A batch goes through in pieces: logits of all its tokens at once would be gigabytes.
    """
    while training.step < training.steps:
        ids = batches[training.step % len(batches)]
        parts = []
        for piece in ids.split(max(1, _PIECE_TOKENS // ids.shape[1])):
            divergence = _divergence(student, teacher, piece) * (len(piece) / len(ids))
            divergence.backward()
            parts.append(divergence.detach())
        training.update()
        loss = sum(map(float, parts))
        training.losses.append(loss)
        progress(training.step, training.steps, loss)
        checkpoint(training)


def _divergence(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = torch.log_softmax(teacher(ids, use_cache=False).logits.flatten(0, 1).float(), -1)
    # CPUs without units for bfloat16, most of them, take longer with it.
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = student(ids, use_cache=False).logits.flatten(0, 1)
    found = torch.log_softmax(logits.float(), -1)
    return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def tune_block(run: Callable[[int], Tensor], wanted: list[Tensor], training: Training) -> tuple[float, float]:
    """Trains a block so that ``run(i)`` comes close to ``wanted[i]``, step after step over all i.

    Returns the squared error of a token's output relative to its square, on average, before and after. Relative for
    every token: the few that are hundreds of times as large as others are normalised like them in the next block.
    """

    def error(i: int) -> Tensor:
        goal = wanted[i].to(training.device).float()
        missed = (run(i).float() - goal).square().mean(-1)
        return (missed / goal.square().mean(-1).clamp_min(1e-30)).mean()

    @torch.no_grad()
    def whole() -> float:
        return sum(float(error(i)) for i in range(len(wanted))) / len(wanted)

    before = whole()
    while training.step < training.steps:
        error(training.step % len(wanted)).backward()
        training.update()
    return before, whole()


def replace_linears(model: nn.Module, coded: Iterable[tuple[str, CodedLinear]]) -> None:
    """Puts coded linears into the places of a model's linears, by module name."""
    for name, module in coded:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
