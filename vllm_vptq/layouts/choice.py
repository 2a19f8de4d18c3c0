"""Which layout a layer gets, and which op then serves it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vllm_vptq import gpu, ops
from vllm_vptq.build import BuildError, cuda_extension
from vllm_vptq.layouts import compact, memory, stationary, streams
from vllm_vptq.layouts.conditioned import condition
from vllm_vptq.layouts.memory import ALIGNED, COMPACT, STATIONARY
from vllm_vptq.layouts.passes import SHARED_BYTES
from vllm_vptq.parameters import ModuleShard

logger = logging.getLogger("vllm." + __name__)  # vLLM's handler shows it

LAYOUT = "VLLM_VPTQ_LAYOUT"
CHOICES = ("auto", *memory.LAYOUTS)


@dataclass(frozen=True)
class LayerLayout:
    """How a layer is laid out, without its tensors, which are parameters of the layer.

    ``apply_op`` is the one op of the layer, ``plan`` its last argument: numbers, or their name for the ops of a GPU.
    """

    name: str
    apply_op: Callable[..., Tensor]
    plan: tuple[int, ...] | str
    in_features: int
    weights: int
    tensor_names: tuple[str, ...]

    def apply(self, x: Tensor, bias: Tensor | None, **tensors: Tensor | None) -> Tensor:
        """``y [..., out_features]`` of ``x [..., in_features]``."""
        return self.apply_op(x, **tensors, bias=bias, plan=self.plan)

    def weight(self, **tensors: Tensor | None) -> Tensor:
        """The dense weight ``[out_features, in_features]``."""
        if isinstance(self.plan, str):
            return gpu.lookup_weight(**tensors, plan=self.plan)
        device = next(t.device for t in tensors.values() if t is not None)
        return self.apply(torch.eye(self.in_features, device=device), None, **tensors).T


def build(
    name: str, shards: Sequence[ModuleShard], dtype: torch.dtype, device: torch.device, choose: Callable[[], str]
) -> tuple[LayerLayout, dict[str, Tensor | None]]:
    """Lays out the shards of layer ``name``, in the layout that ``choose`` says where there are several.

    RuntimeError with the remedy if only a slow way would be left that nobody asked for.
    """
    shards = condition(shards, dtype)
    if device.type == "cpu" or not _native(name, dtype):
        return _of(COMPACT, ops.linear, compact.build(shards, dtype, device), shards)
    kind = choose()
    return lay_out(kind, shards, dtype, device, crossover(device, kind, shards))


def lay_out(
    kind: str, shards: Sequence[ModuleShard], dtype: torch.dtype, device: torch.device, direct_tokens: int
) -> tuple[LayerLayout, dict[str, Tensor | None]]:
    """Lays shards out for the CUDA kernels; calls of up to ``direct_tokens`` look weights up, others decode them.

    RuntimeError if this GPU has no such layout.
    """
    hardware = stationary.Gpu.of(device)
    need = None
    if kind == ALIGNED and not hardware.tensor_groups:
        need = "the warp-group products of Hopper"
    elif kind == STATIONARY and not hardware.serves(shards):
        need = f"shared memory for books of more than {hardware.most_entries} entries"
    if need:
        raise RuntimeError(f"{LAYOUT}={kind} needs {need}, which this GPU lacks; use auto or {COMPACT}")
    if kind == COMPACT:
        small = compact.build(shards, dtype, device)
        made = streams.build(small, shards[0].in_features, hardware.processors, direct_tokens)
        return _of(kind, gpu.lookup_linear, made, shards)
    packed = stationary.build(shards, dtype, device, hardware, direct_tokens, lists=kind == STATIONARY)
    return _of(kind, gpu.lookup_linear, packed, shards)


def available(device: torch.device) -> tuple[str, ...]:
    """The layouts that ``auto`` may choose from.

    Where not all books fit shared memory, ``stationary`` has not run yet on such a card, and is for who asks for it.
    """
    hardware = stationary.Gpu.of(device)
    if hardware.shared_bytes < SHARED_BYTES:
        return (COMPACT,)
    return memory.LAYOUTS if hardware.tensor_groups else (COMPACT, STATIONARY)


def _of(
    kind: str, apply_op: Callable[..., Tensor], made: Any, shards: Sequence[ModuleShard]
) -> tuple[LayerLayout, dict[str, Tensor | None]]:
    tensors: dict[str, Tensor | None] = made.tensors()
    in_features = shards[0].in_features
    weights = sum(shard.out_features for shard in shards) * in_features
    plan = gpu.name_of(made.plan) if apply_op is gpu.lookup_linear else tuple(made.plan)
    return LayerLayout(kind, apply_op, plan, in_features, weights, tuple(tensors)), tensors


class Layers:
    """The quantized layers of a model: which layout each gets, and what they hold, logged when the last is laid out.

    ``memory_share``: of the GPU's memory, that vLLM may use. ``progress``: whether to show how many have been laid out.
    """

    def __init__(self) -> None:
        self.awaited = 0
        self.memory_share = 1.0
        self.progress = False
        self.weights: dict[str, int] = {}
        self.nbytes: dict[str, int] = {}
        self._loaded: dict[str, Callable[[], Sequence[ModuleShard]]] = {}
        self._chosen: dict[str, str] = {}
        self._bar: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """vLLM pickles its configuration, of which this is part; layers stay where they are."""
        return {**self.__dict__, "_loaded": {}, "_bar": None}

    def expect(self, name: str, loaded: Callable[[], Sequence[ModuleShard]]) -> None:
        """Announces a layer; ``loaded`` gives its shards once they are complete, and nothing before or afterwards."""
        self._loaded[name] = loaded

    def choose(self, name: str, device: torch.device) -> str:
        """The layout of a layer whose shards are loaded: the user's choice, or what memory allows.

        With the first layer all that are loaded are decided on, so that each knows of the others. Ranks of a tensor
        parallel group decide by their own free memory; should they differ, no more follows than other roundings in
        their shares of the sums.
        """
        if (asked := chosen()) != "auto":
            return asked
        if name not in self._chosen:
            self._decide(device)
        return self._chosen[name]

    def _decide(self, device: torch.device) -> None:
        layouts = available(device)
        found = {
            name: memory.measure(shards, layouts)
            for name, loaded in self._loaded.items()
            if name not in self._chosen and (shards := loaded())
        }
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        free += torch.cuda.memory_reserved(device) - allocated
        usable = self.memory_share * total
        # Shards, as large as the compact layout, are in memory by now. The share is this engine's: what others on the
        # GPU hold does not count against it, as it does not in vLLM.
        budget = min(usable - allocated, free) - memory.ROOM * usable
        decided = memory.distribute(list(found.values()), budget)
        self._chosen |= dict(zip(found, decided, strict=True))
        if any(kind != list(layer.nbytes)[-1] for kind, layer in zip(decided, found.values(), strict=True)):
            counts = ", ".join(f"{decided.count(kind)} {kind}" for kind in layouts if kind in decided)
            logger.info(
                "VPTQ layouts of %d layers: %s; faster ones would leave KV cache and activations less than %.1f GiB "
                "(%s chooses otherwise)", len(found), counts, memory.ROOM * usable / 2**30, LAYOUT,
            )  # fmt: skip

    def add(self, kind: str, weights: int, tensors: Iterable[Tensor | None]) -> None:
        """Counts a layer of ``weights`` weights that has been laid out as ``kind``."""
        size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        self.weights[kind] = self.weights.get(kind, 0) + weights
        self.nbytes[kind] = self.nbytes.get(kind, 0) + size
        self._advance()
        self.awaited -= 1
        if not self.awaited:
            logger.info("VPTQ weights: %s", self)

    def _advance(self) -> None:
        """vLLM's own bar counts files read; this is what follows."""
        if self._bar is None:
            first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
            shown = self.progress and first
            self._bar = tqdm(total=self.awaited, desc="Laying out VPTQ layers", mininterval=1, disable=not shown)
        self._bar.update()
        if self.awaited == 1:
            self._bar.close()
            self._bar = None

    def __str__(self) -> str:
        return ", ".join(
            f"{self.nbytes[kind] / 2**30:.2f} GiB in {kind} layout ({self.nbytes[kind] * 8 / weights:.2f} bits/weight)"
            for kind, weights in self.weights.items()
        )


def chosen() -> str:
    """The user's choice of a layout; ValueError if it is none."""
    choice = os.environ.get(LAYOUT, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{LAYOUT}={choice}: choose one of {', '.join(CHOICES)}")
    return choice


def crossover(device: torch.device, layout: str, shards: Sequence[ModuleShard]) -> int:
    """The most tokens for which looking weights up beats decoding them for cuBLAS, by crossovers.json.

    Measured on the kinds of GPU that have a row there; what others get is assumed.
    """
    table = _crossovers()
    major, minor = torch.cuda.get_device_capability(device)
    return (table.get(f"{major}.{minor}") or table["default"])[
        layout if layout == COMPACT else stationary.crossover_class(shards)
    ]


@cache
def _crossovers() -> dict[str, dict[str, int]]:
    """Tokens by class of layers, for each compute capability; where they come from is for people."""
    table = json.loads(resources.files("vllm_vptq.layouts").joinpath("crossovers.json").read_text())
    return {name: dict(row["tokens"]) for name, row in table.items()}


@cache
def _say_slow(problem: str) -> None:
    logger.warning("VPTQ layers run in torch, slowly, as %s=1 allows: %s", ops.ALLOW_REFERENCE, problem)


def _native(name: str, dtype: torch.dtype) -> bool:
    """Whether the CUDA kernels serve; False only where the user asked for the torch implementation by name."""
    problem = None
    if dtype not in (torch.float16, torch.bfloat16):
        problem = f"the CUDA kernels compute in float16 or bfloat16, not {dtype}; pass --dtype float16"
    else:
        try:
            cuda_extension()
        except BuildError as error:
            problem = f"no CUDA kernels: {error}"
    if problem is None:
        return True
    if os.environ.get(ops.ALLOW_REFERENCE) == "1":
        _say_slow(problem)
        return False
    raise RuntimeError(f"{name}: {problem} (or set {ops.ALLOW_REFERENCE}=1 to run the slow torch implementation)")
