"""A whole run: load, calibrate, choose bits, code block by block, keep every layer on disk; then write."""

from __future__ import annotations

import contextlib
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize import native
from quantize.allocate import allocate
from quantize.blocks import quantize_blocks
from quantize.calibration import calibration_tokens, sequences, wanted_tokens, writes_itself
from quantize.curvature import CURVATURE_TOKENS, coupled, curvatures
from quantize.devices import Share, be_deterministic, choose_devices, resident
from quantize.errors import QuantizeError
from quantize.estimate import planned, too_large
from quantize.export import REVISION, Exporter
from quantize.model import Block, commit_of, decoder_blocks, first_inputs, load
from quantize.moments import Weights, output_gradients
from quantize.parts import Parts
from quantize.plan import Plan, left_dense_note, make_plan
from quantize.recipe import LayerRecipe, Recipe
from quantize.report import Report
from quantize.run import Run, tuned_part
from quantize.sensitivity import measure
from quantize.solver import row_groups
from quantize.training import finetune_model
from vllm_vptq.format import effective_bits

_MEASURED_TOKENS = 8192
"""Calibration tokens that sensitivities are measured on."""


def quantize_model(
    source: str,
    out: Path,
    recipe: Recipe,
    report: Report,
    cluster: Share | None = None,
    trust: bool = False,
    revision: str | None = None,
) -> Plan:
    """Quantizes a model and writes the checkpoint to ``out``; see ``Recipe`` for what can be chosen.

    Layers are coded on this machine's devices, or where the ``cluster`` has its jobs done, to the same bits.
    A run into the ``out`` of a killed one with the same model and recipe goes on where that stopped. ``trust`` allows
    code that the model brings along to run; ``revision`` is the model's on the hub.
    """
    run, plan, versions = code_model(source, out, recipe, report, cluster, trust, revision)
    finish_model(run, plan, out, versions)
    return plan


def code_model(
    source: str,
    out: Path,
    recipe: Recipe,
    report: Report,
    cluster: Share | None = None,
    trust: bool = False,
    revision: str | None = None,
) -> tuple[Run, Plan, dict[str, str]]:
    """The first half of :func:`quantize_model`: all layers coded, as parts in ``out``; and the versions of all."""
    devices = choose_devices(recipe.device)
    if cluster is None:
        native.prepare(devices[0])
    be_deterministic()
    versions = {name: version(name) for name in ("torch", "transformers", "vllm-vptq")}
    asked = {"model": source, "revision": revision, "recipe": recipe.model_dump(mode="json"), "versions": versions}
    parts = Parts(out, asked)
    report.stage("loading the model")
    model, tokenizer = load(source, trust, revision)
    blocks = decoder_blocks(model)
    expected = planned(model, recipe)  # or hours would pass before its mistakes were seen
    report.note(left_dense_note(blocks))
    _require_space(out, model, expected)
    if reason := too_large(model, expected, recipe, devices[0], "calibration" in parts):
        raise QuantizeError(reason)

    report.stage("calibration text" if recipe.calibration else "calibration text, written by the model")
    if "calibration" not in parts:
        parts.save("calibration", {"ids": _calibration(model, tokenizer, recipe, expected.widest, devices[0], report)})
    trained = parts.load("calibration")["ids"].to(devices[0])
    ids = trained[: sequences(recipe, wanted_tokens(recipe, expected.widest))]
    if trained.numel() >= recipe.tokens + recipe.context:
        others = f", and {trained.numel() - ids.numel():,} more for training" if len(trained) > len(ids) else ""
        report.note(f"{ids.numel():,} calibration tokens for layers so wide{others}; --tokens sets their number")
    run = Run(model, tokenizer, blocks, recipe, parts, report, ids, trained, devices, cluster)
    plan, weights = _prepare(run)
    report.plan(source, plan.specs, plan.weights, plan.bits)
    report.stage("quantizing")
    quantize_blocks(run, plan, first_inputs(model, blocks, run.block_batches()), weights)
    if commit := commit_of(source, revision):
        versions[REVISION] = commit  # a branch may move
    return run, plan, versions


def finish_model(run: Run, plan: Plan, out: Path, versions: dict[str, str]) -> None:
    """The second half: trains end to end if the recipe asks for it, and turns parts into a checkpoint."""
    if run.recipe.finetune.steps:
        run.report.stage("fine-tuning")
        finetune_model(run, plan)
    _write(run, plan, out, versions)
    run.parts.remove()


def _require_space(out: Path, model: nn.Module, plan: Plan) -> None:
    """QuantizeError where the disk is too full. For a moment coded layers lie there twice, as parts and in shards.

    Training has books and norms there, too: its results, those of the blocks, and 12 bytes for their 2 on its way.
    """
    coded = {f"{name}.weight" for name in plan.specs}
    needed = sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in coded)
    for spec in plan.specs.values():
        size = effective_bits(spec) * math.prod(spec.shape) / 8
        trained = size - spec.total_bits / spec.vector_len * math.prod(spec.shape) / 8
        needed += int(2 * size + 8 * trained)
    needed -= sum(file.stat().st_size for file in (out / "parts").iterdir())  # of a run that goes on
    free = shutil.disk_usage(out).free
    if free < needed:
        raise QuantizeError(f"{out}: {free / 2**30:.1f} GiB are free, up to {needed / 2**30:.1f} are needed")


def _calibration(
    model: nn.Module, tokenizer: Any, recipe: Recipe, widest: int, device: torch.device, report: Report
) -> Tensor:
    with resident(model, device) if writes_itself(recipe) else contextlib.nullcontext():
        return calibration_tokens(model, tokenizer, recipe, report.progress, widest)


def _prepare(run: Run) -> tuple[Plan, Weights | None]:
    """The plan, and what the end loss feels of every layer if the recipe asks for it."""
    recipe = run.recipe
    chosen = run.parts.read_json("plan")
    if recipe.bits is not None and chosen is None:
        plan = make_plan(run.blocks, recipe)
        sensitivity = dict.fromkeys(plan.layers, dict.fromkeys((True, False), 1.0))
        if recipe.allocation == "measured":
            run.report.stage("measuring what each layer is worth")
            batches = run.first_batches(_MEASURED_TOKENS)
            progress = run.report.progress
            sensitivity = measure(run.model, run.blocks, plan, batches, recipe, run.share, progress, run.parts)
        layers = allocate(plan.layers, plan.shapes, sensitivity, recipe)
        run.parts.write_json("plan", {name: layer.model_dump() for name, layer in layers.items()})
        chosen = run.parts.read_json("plan")
    known = None if chosen is None else {name: LayerRecipe(**layer) for name, layer in chosen.items()}
    plan = make_plan(run.blocks, recipe, known)
    weights: Weights | None = None
    if recipe.guided:
        run.report.stage("gradients of the end loss")
        groups = {name: row_groups(spec.shape[0], recipe.guided, spec) for name, spec in plan.specs.items()}
        weights, _ = output_gradients(run.model, run.blocks, groups, run.id_batches())
    missing = [name for name in coupled(plan.shapes) if name not in run.parts] if recipe.curvature else []
    if missing:
        run.report.stage("curvature of the end loss")
        batches = run.first_batches(CURVATURE_TOKENS)
        run.curvatures |= curvatures(run.model, run.blocks, missing, batches, recipe.seed)
    return plan, weights


def _write(run: Run, plan: Plan, out: Path, versions: dict[str, str]) -> None:
    """Turns parts into the checkpoint: a shard for each block, and one for the rest."""
    exporter = Exporter(out)
    tuned = run.parts.load("tuned") if "tuned" in run.parts else {}

    def add(tensors: dict[str, Tensor]) -> None:
        exporter.add_shard({name: tuned.get(name, tensor) for name, tensor in tensors.items()})

    for block in run.blocks:
        tensors = {f"{block.name}.{k}": v for k, v in _dense_state(block, plan).items()}
        if tuned_part(block) in run.parts:
            tensors |= {k: v for k, v in run.parts.load(tuned_part(block)).items() if k in tensors}
        for name in block.linears:
            if name in plan.specs:
                tensors |= {f"{name}.{key}": tensor for key, tensor in run.tensors(name).items()}
        add(tensors)
    prefixes = tuple(f"{block.name}." for block in run.blocks)
    add({k: v for k, v in _untied_state(run.model).items() if not k.startswith(prefixes)})
    names = [*plan.specs, *(tuned_part(block) for block in run.blocks), "tuned"]
    run.report.write(out, [run.parts.record(name) for name in names if name in run.parts])
    exporter.finish(run.model, run.tokenizer, plan.specs, run.recipe, versions)


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
