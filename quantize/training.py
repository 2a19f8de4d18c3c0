"""Where training meets a run: coded linears in the places of dense ones, its state and its results among the parts."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quantize.coded import CodedLinear
from quantize.devices import peak_memory, repeatable_gradients, resident, start_peak
from quantize.finetune import Training, replace_linears, trainable, tune_block, tune_model
from quantize.model import Batch, Block
from quantize.plan import Plan
from quantize.run import Run, tuned_part
from vllm_vptq.format import LayerSpec, dequantize

_CHECKPOINT_SECONDS = 120.0
_RATE_BITS = 2.25
RATE, BLOCK_RATE = 2e-3, 5e-3
"""Of the first step end to end and of a block's, at so many index bits a weight."""


def first_rate(asked: float | None, rate: float, specs: Sequence[LayerSpec]) -> float:
    """The rate that a recipe asks for; else a given one, halved with every index bit a weight beyond 2.25 on average.

    What books leave of a weight halves with every bit; steps that mend more than they spoil at 2 bits do not at 4.
    """
    if asked is not None:
        return asked
    weights = [math.prod(spec.shape) for spec in specs]
    indices = sum(spec.total_bits / spec.vector_len * count for spec, count in zip(specs, weights, strict=True))
    return rate * min(1.0, 2.0 ** (_RATE_BITS - indices / sum(weights)))


def finetune_block(
    run: Run, plan: Plan, i: int, block: Block, batches: list[Batch], wanted: list[Tensor]
) -> tuple[float, float]:
    """Trains a coded block towards ``wanted``, its original output for each batch; the result is a part."""
    prefix, started = f"{block.name}.", time.perf_counter()
    start_peak(run.device)
    copy_ = Block(block.name, copy.deepcopy(block.module), {})
    coded = _coded_linears(run, plan, [name for name in block.linears if name in plan.specs])
    replace_linears(copy_.module, ((name.removeprefix(prefix), module) for name, module in coded.items()))
    copy_.module.float()  # what is left dense, beside norms that are trained in float32
    settings = run.recipe.finetune_blocks
    specs = [module.spec for module in coded.values()]
    training = Training(trainable(copy_.module), first_rate(settings.rate, BLOCK_RATE, specs), settings.steps)
    with repeatable_gradients(run.device):
        errors = tune_block(lambda j: batches[j].ordinary(i).run(i, copy_.module), wanted, training)
    parameters = {f"{prefix}{name}": parameter for name, parameter in training.parameters.items()}
    before, after = errors
    record = {"block": block.name, "error_before": before, "error": after, "steps": settings.steps}
    record |= {"seconds": round(time.perf_counter() - started, 3), "peak_mib": peak_memory(run.device) >> 20}
    run.parts.save(tuned_part(block), _tuned_tensors(run, coded, parameters), record)
    return errors


def _tuned_tensors(
    run: Run, coded: Mapping[str, CodedLinear], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What training changed, by the checkpoint's names and in its dtypes: coded linears, and the model's own norms."""
    tuned = {f"{name}.{key}": tensor for name, module in coded.items() for key, tensor in module.tensors().items()}
    dtypes = {name: tensor.dtype for name, tensor in run.model.state_dict().items()}
    return tuned | {name: p.detach().to(dtypes[name]) for name, p in parameters.items() if name in dtypes}


@torch.no_grad()
def put_tuned(run: Run, plan: Plan, block: Block) -> None:
    """Puts a block's trained weights and norms into the model."""
    tensors = run.parts.load(tuned_part(block))
    norms = {name: p for name, p in block.module.named_parameters() if f"{block.name}.{name}" in tensors}
    for name, parameter in norms.items():
        parameter.data = tensors[f"{block.name}.{name}"].to(parameter.device)
    for name, linear in block.linears.items():
        if name in plan.specs:
            on_device = {key: tensor.to(run.device) for key, tensor in run.tensors(name).items()}
            put_weight(linear, dequantize(on_device, plan.specs[name]))


def _coded_linears(run: Run, plan: Plan, names: list[str]) -> dict[str, CodedLinear]:
    """Coded linears to be trained, with biases of their own in float32, as their block's training left them."""
    coded = {}
    for name in names:
        tensors = {key: tensor.to(run.device) for key, tensor in run.tensors(name).items()}
        bias = run.model.get_submodule(name).bias
        if bias is not None:
            bias = run.trained(name).get(f"{name}.bias", bias.detach())
            bias = nn.Parameter(bias.to(run.device, torch.float32, copy=True))
        coded[name] = CodedLinear(tensors, plan.specs[name], bias)
    return coded


def finetune_model(run: Run, plan: Plan) -> None:
    """Trains books and norms end to end; the result is the part ``tuned``, with the checkpoint's names of tensors.

    Original and copy are both on the first device, whole.
    """
    if "tuned" in run.parts:
        return
    with resident(run.model, run.device):
        _finetune_model(run, plan)


def _finetune_model(run: Run, plan: Plan) -> None:
    start_peak(run.device)
    coded = _coded_linears(run, plan, list(plan.specs))
    with torch.no_grad():
        student = _copy_without(run.model, coded)
    replace_linears(student, coded.items())
    if run.device.type == "cpu":
        student.float()
    for name, parameter in student.named_parameters():
        trained = run.trained(name).get(name)
        if trained is not None and name.rpartition(".")[0] not in coded:  # a norm
            parameter.data = trained.to(run.device, copy=True)
    settings = run.recipe.finetune
    specs = list(plan.specs.values())
    training = Training(trainable(student), first_rate(settings.rate, RATE, specs), settings.steps)
    if "training" in run.parts:
        training.load(run.parts.load("training"))
    saved = time.monotonic()

    def checkpoint(state: Training) -> None:
        nonlocal saved
        if time.monotonic() - saved > _CHECKPOINT_SECONDS:
            run.parts.save("training", state.state())
            saved = time.monotonic()

    def progress(step: int, steps: int, loss: float) -> None:
        run.report.training(step, steps, loss)

    with repeatable_gradients(run.device):
        tune_model(student, run.model, run.trained_batches(), training, progress, checkpoint)
    losses = [round(loss, 5) for loss in training.losses]
    record = {"training": "end to end", "losses": losses, "peak_mib": peak_memory(run.device) >> 20}
    run.parts.save("tuned", _tuned_tensors(run, coded, training.parameters), record)


def _copy_without(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of a model, but of the weights of some linears, which it shares."""
    shared = {id(weight): weight for weight in (model.get_submodule(name).weight for name in names)}
    return copy.deepcopy(model, shared)


def put_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Gives a linear another weight ``[out_features, in_features]``, in its own dtype; the old one is left as it is."""
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
