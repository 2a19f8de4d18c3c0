"""The walk over a model: block by block, collect second moments, solve every linear, keep it on disk; then write."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.allocate import allocate
from quantize.calibration import calibration_tokens
from quantize.errors import QuantizeError
from quantize.export import Exporter
from quantize.model import Batch, Block, decoder_blocks, first_inputs, load
from quantize.moments import Weights, collect, output_gradients, stages
from quantize.parts import Parts
from quantize.plan import Plan, make_plan
from quantize.recipe import LayerRecipe, Recipe
from quantize.report import Report
from quantize.run import BATCH_TOKENS, Run, tuned_part
from quantize.sensitivity import measure
from quantize.solver import row_groups, solve
from quantize.training import finetune_block, finetune_model, put_tuned, put_weight
from vllm_vptq.format import dequantize, effective_bits

_MEASURED_TOKENS = 8192
"""Calibration tokens that sensitivities are measured on."""


def quantize_model(source: str, out: Path, recipe: Recipe, report: Report) -> Plan:
    """Quantizes a model and writes the checkpoint to ``out``; see ``Recipe`` for what can be chosen.

    A run into the ``out`` of a killed one with the same model and recipe goes on where that stopped.
    """
    device = choose_device(recipe)
    if device.type == "cuda":  # where sums by index would otherwise depend on the order of atomic additions
        torch.use_deterministic_algorithms(True, warn_only=True)
    versions = {name: version(name) for name in ("torch", "transformers", "vllm-vptq")}
    parts = Parts(out, {"model": source, "recipe": recipe.model_dump(mode="json"), "versions": versions})
    report.stage("loading the model")
    model, tokenizer = load(source, device)
    blocks = decoder_blocks(model)
    make_plan(blocks, recipe)  # or hours would pass before its mistakes were seen
    _require_space(out, model)

    report.stage("calibration text" if recipe.calibration else "calibration text, written by the model")
    if "calibration" not in parts:
        parts.save("calibration", {"ids": calibration_tokens(model, tokenizer, recipe, report.progress)})
    run = Run(model, tokenizer, blocks, recipe, parts, report, parts.load("calibration")["ids"].to(device))
    plan, weights = _prepare(run)
    report.plan(source, plan.specs, plan.weights, plan.bits)
    report.stage("quantizing")
    _quantize_blocks(run, plan, weights)
    if recipe.finetune.steps:
        report.stage("fine-tuning")
        finetune_model(run, plan, source)
    _write(run, plan, out)
    parts.remove()
    return plan


def _require_space(out: Path, model: nn.Module) -> None:
    """QuantizeError where the disk is too full: parts and checkpoint together take no more than the dense model."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(out).free
    if free < needed:
        raise QuantizeError(f"{out}: {free / 2**30:.1f} GiB are free, up to {needed / 2**30:.1f} are needed")


def choose_device(recipe: Recipe) -> torch.device:
    """The device a recipe asks for; QuantizeError if there is none."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise QuantizeError("device cuda was asked for and torch finds none")
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(recipe.device)


def _prepare(run: Run) -> tuple[Plan, Weights | None]:
    """The plan, and what the end loss feels of every layer if the recipe asks for it."""
    recipe = run.recipe
    chosen = run.parts.read_json("plan")
    if recipe.bits is not None and chosen is None:
        plan = make_plan(run.blocks, recipe)
        sensitivity = dict.fromkeys(plan.layers, dict.fromkeys((True, False), 1.0))
        if recipe.allocation == "measured":
            run.report.stage("measuring what each layer is worth")
            batches = run.id_batches()[: max(1, _MEASURED_TOKENS // BATCH_TOKENS)]
            sensitivity = measure(run.model, run.blocks, plan, batches, recipe, run.report.progress)
        layers = allocate(plan.layers, plan.shapes, sensitivity, recipe)
        run.parts.write_json("plan", {name: layer.model_dump() for name, layer in layers.items()})
        chosen = run.parts.read_json("plan")
    known = None if chosen is None else {name: LayerRecipe(**layer) for name, layer in chosen.items()}
    plan = make_plan(run.blocks, recipe, known)
    weights: Weights | None = None
    if recipe.guided:
        run.report.stage("gradients of the end loss")
        groups = {name: row_groups(spec.shape[0], recipe.guided, spec) for name, spec in plan.specs.items()}
        weights, _ = output_gradients(run.model, groups, run.id_batches())
    return plan, weights


def _quantize_blocks(run: Run, plan: Plan, weights: Weights | None) -> None:
    """Codes every linear that has no part yet, and puts the coded weights into the model."""
    batches = first_inputs(run.model, run.blocks, run.id_batches())
    done = 0
    for i, block in enumerate(run.blocks):
        started = time.perf_counter()
        names = [name for name in block.linears if name in plan.layers]
        order = stages(i, block, names, batches[0])
        lost = set(names) - {name for stage in order for name in stage}
        if lost:
            raise QuantizeError(f"{min(lost)}: no calibration token reached this layer; skip it with a rule")
        original = run.recipe.activations == "original"
        hidden = _advanced(i, block, batches) if original else None
        tuning = run.recipe.finetune_blocks.steps
        wanted = _advanced(i, block, batches) if tuning and tuned_part(block) not in run.parts else []
        coded: dict[str, Tensor] = {}
        for stage in order:
            moments = None
            for name in stage:
                if name not in run.parts:
                    moments = moments or collect(i, block, stage, batches, weights)
                    _solve(run, block.linears[name], name, plan.layers[name], moments[name])
                tensors = {key: tensor.to(run.ids.device) for key, tensor in run.parts.load(name).items()}
                coded[name] = dequantize(tensors, plan.specs[name])
                done += 1
                record = run.parts.record(name)
                run.report.layer(name, plan.specs[name], record["error"], done, len(plan.specs))
                if not original:
                    put_weight(block.linears[name], coded[name])
        for name, weight in coded.items():
            put_weight(block.linears[name], weight)
        if tuning:
            if wanted:
                run.report.block_tuned(block.name, *finetune_block(run, plan, i, block, batches, wanted))
            put_tuned(run, plan, block)
        for batch, after in zip(batches, hidden or _advanced(i, block, batches), strict=True):
            batch.hidden = after
        run.report.block(block.name, time.perf_counter() - started)


@torch.inference_mode()
def _advanced(i: int, block: Block, batches: list[Batch]) -> list[Tensor]:
    """What the block gives for each batch."""
    return [batch.run(i, block.module) for batch in batches]


@torch.inference_mode()
def _solve(run: Run, linear: nn.Linear, name: str, layer: LayerRecipe, moment: Tensor) -> None:
    started = time.perf_counter()
    try:
        solution = solve(linear.weight.data, moment, layer, run.recipe, book_dtype(linear.weight.dtype))
    except QuantizeError as error:
        raise QuantizeError(f"{name}: {error}") from error
    record = {
        "layer": name,
        "bits": effective_bits(solution.spec),
        "error": solution.error,
        "steps": solution.steps,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_mib": _peak_memory(linear.weight.device),
    }
    run.parts.save(name, solution.tensors, record)


def _peak_memory(device: torch.device) -> int:
    """The most memory held so far, MiB: on a GPU its own, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def book_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """What books and norms are stored in: 16 bits always, or a "2 bit" model would not be one."""
    return torch.float16 if weight_dtype == torch.float32 else weight_dtype


def _write(run: Run, plan: Plan, out: Path) -> None:
    """Turns parts into the checkpoint: a shard for each block, and one for the rest."""
    exporter = Exporter(out)
    tuned = run.parts.load("tuned") if "tuned" in run.parts else {}

    def add(tensors: dict[str, Tensor]) -> None:
        exporter.add_shard({name: tuned.get(name, tensor) for name, tensor in tensors.items()})

    for block in run.blocks:
        tensors = {f"{block.name}.{k}": v for k, v in _dense_state(block, plan).items()}
        for name in block.linears:
            if name in plan.specs:
                tensors |= {f"{name}.{key}": tensor for key, tensor in run.tensors(name).items()}
        add(tensors)
    prefixes = tuple(f"{block.name}." for block in run.blocks)
    add({k: v for k, v in _untied_state(run.model).items() if not k.startswith(prefixes)})
    run.report.write(out, [run.parts.record(name) for name in plan.specs])
    exporter.finish(run.model, run.tokenizer, plan.specs, run.recipe)


def _dense_state(block: Block, plan: Plan) -> dict[str, Tensor]:
    """The block's tensors that stay as they are: norms, biases, linears left dense."""
    prefix = f"{block.name}."
    coded = {f"{name.removeprefix(prefix)}.weight" for name in block.linears if name in plan.specs}
    return {name: tensor for name, tensor in block.module.state_dict().items() if name not in coded}


def _untied_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors, each once: a tied head is the embedding."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors
