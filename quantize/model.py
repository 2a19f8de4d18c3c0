"""Finding one's way in a Hugging Face decoder: its blocks, their linear layers, what the first block receives."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quantize.devices import streamed
from quantize.errors import QuantizeError
from vllm_vptq.limits import limit_of

_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
_ON_DEVICE = 2 << 30
"""Bytes of hidden states that may stay on a GPU, of all batches."""


def load(model: str, trust: bool = False, revision: str | None = None) -> tuple[nn.Module, Any]:
    """A causal language model in its own dtype, and its tokenizer; QuantizeError if either can't be loaded.

    Weights stay in their files, mapped into memory, until they are used; whoever changes them must replace them.
    ``trust`` allows code that the model brings along to run. ``revision`` is a branch, tag or commit on the hub.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with loading(model, revision):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust, revision=revision)
        if any(getattr(config, key, None) for key in ("quantization_config", "quant_config")):
            raise QuantizeError(f"model {model} is quantized already; start from the original")
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust, revision=revision)
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", low_cpu_mem_usage=True, trust_remote_code=trust, revision=revision
        )
    return loaded.eval(), tokenizer


def load_shapes(model: str, trust: bool = False, revision: str | None = None) -> nn.Module:
    """A causal language model without its weights, on the device ``meta``: shapes and dtypes only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading(model, revision):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust, revision=revision)
        with torch.device("meta"):
            shapes: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return shapes


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit on the hub that a model was loaded from; None for a directory."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).exists():
        return None
    file = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


@contextlib.contextmanager
def loading(model: str, revision: str | None = None) -> Iterator[None]:
    """Turns what transformers and safetensors raise for a model that can't be loaded into one line.

    QuantizeError for a ``revision`` of a directory, too, which transformers would ignore.
    """
    from transformers.utils import logging

    if Path(model).exists():
        if revision is not None:
            raise QuantizeError(f"--revision {revision}: {model} is a directory, and only the hub has revisions")
        logging.disable_progress_bar()  # of reading local files, which takes a moment; downloads keep theirs
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0].strip()
        if "trust_remote_code" in str(error):
            reason += " Read it; --trust-remote-code runs it"
        where = "" if Path(model).exists() else " (no such directory, so it was looked up on the hub)"
        raise QuantizeError(f"cannot load model {model}{where}: {reason}") from error


@dataclass
class Block:
    """One decoder block: its full name, and its linear layers by full name."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The blocks of the decoder: the longest list of modules with linear layers inside; of two, the outer one.

    Lists inside a block are none: experts, and what lies in the items of a list beside linear layers of their own.
    Routers are none of them: small, and what they say decides about all the rest, so that servers keep them dense.
    Nor is what our server refuses to load: routed experts.
    """
    name, blocks = _longest_list(model)
    found = []
    for i, block in enumerate(blocks):
        prefix = f"{name}.{i}"
        size = sum(parameter.numel() for parameter in block.parameters())
        linears = {
            f"{prefix}.{n}": m
            for n, m in block.named_modules()
            if isinstance(m, nn.Linear)
            and not (_ROUTER.search(n) and m.weight.numel() < size / 50)
            and not limit_of(f"{prefix}.{n}")
        }
        found.append(Block(prefix, block, linears))
    return found


def _longest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and _may_be_blocks(name, m)}
    if not lists:
        raise QuantizeError(f"{type(model).__name__} has no list of blocks with linear layers; nothing to quantize")
    # Those with linears in no further list hold blocks; others, say of stages, hold only lists.
    of_blocks = {_innermost(lists, name) for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {None}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in of_blocks)]
    name = max(outer, key=lambda name: (len(lists[name]), -name.count(".")))
    return name, lists[name]


def _may_be_blocks(name: str, items: nn.ModuleList) -> bool:
    """Whether the items hold linears, but are none themselves, and no routed experts."""
    held = any(isinstance(m, nn.Linear) for m in items.modules())
    return held and not any(isinstance(item, nn.Linear) for item in items) and not limit_of(f"{name}.0")


def _innermost(lists: Container[str], name: str) -> str | None:
    """The innermost of the lists that a module lies in."""
    while name and name not in lists:
        name = name.rpartition(".")[0]
    return name or None


class Stop(Exception):
    """Ends a forward pass once everything of interest was seen."""


@dataclass
class Batch:
    """A batch on its way through the blocks: its hidden states, and each block's keyword arguments by position."""

    hidden: Tensor
    """On the device, or pinned in the host's memory where a run has too much of it."""
    arguments: list[dict]

    def keep(self, hidden: Tensor) -> None:
        """Takes other hidden states, of the same shape, where the old ones were."""
        self.hidden.copy_(hidden)

    def ordinary(self, i: int) -> Batch:
        """A copy for block i alone, in float32, that autograd can save; what inference mode made, it refuses."""

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()
            if isinstance(value, (tuple, list)):
                return type(value)(copied(item) for item in value)
            return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value

        return Batch(copied(self.hidden), [copied(own) if j == i else {} for j, own in enumerate(self.arguments)])

    def run(self, i: int, block: nn.Module) -> Tensor:
        """Block i's output hidden states."""
        device = next(block.parameters()).device
        output = block(self.hidden.to(device, non_blocking=True), **self.arguments[i])
        return output[0] if isinstance(output, tuple) else output


@torch.inference_mode()
def first_inputs(model: nn.Module, blocks: list[Block], batches: list[Tensor]) -> list[Batch]:
    """What the first block receives for each batch of token ids, and the keyword arguments of every block.

    Blocks may be called with different arguments (sliding and full attention masks), which depend on the batch's
    shape alone: one whole pass for every shape records them.
    """
    inputs: list[Tensor] = []

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        large = hidden.device.type == "cuda" and hidden.nbytes * len(batches) > _ON_DEVICE
        inputs.append(torch.empty_like(hidden, device="cpu", pin_memory=True).copy_(hidden) if large else hidden)
        raise Stop

    with streamed(model, [block.module for block in blocks], batches[0].device):
        arguments = {ids.shape: _arguments(model, blocks, ids) for ids in {ids.shape: ids for ids in batches}.values()}
        hook = blocks[0].module.register_forward_pre_hook(stop, with_kwargs=True)
        for ids in batches:
            with contextlib.suppress(Stop):
                _decoder(model)(ids, use_cache=False)
        hook.remove()
    return [Batch(hidden, arguments[ids.shape]) for hidden, ids in zip(inputs, batches, strict=True)]


def _arguments(model: nn.Module, blocks: list[Block], ids: Tensor) -> list[dict]:
    arguments: list[dict] = [{} for _ in blocks]

    def record(i: int, _: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(args) > 1:
            raise QuantizeError(
                f"{blocks[i].name} takes more than one positional argument; this model is not supported"
            )
        arguments[i] = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}

    hooks = [
        block.module.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: record(i, m, args, kwargs), with_kwargs=True
        )
        for i, block in enumerate(blocks)
    ]
    _decoder(model)(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return arguments


def _decoder(model: nn.Module) -> nn.Module:
    """The model without its head, whose logits nobody needs here."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)
