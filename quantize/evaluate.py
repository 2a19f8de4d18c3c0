"""What dense and VPTQ checkpoints alike make of a text, through transformers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.devices import fits, free_memory, streamed
from quantize.errors import QuantizeError
from quantize.export import dense_tensors, read_config
from quantize.model import decoder_blocks, loading
from vllm_vptq.format import VPTQFormatError, is_vptq_section
from vllm_vptq.hub import checkpoint_folder

_CONTEXT = 1024
_WINDOWS = 8


def load_any(
    model: str, device: torch.device, dtype: torch.dtype | None = torch.float32, trust: bool = False
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; a VPTQ checkpoint is loaded as the dense model it stands for.

    ``dtype`` None is the one that the checkpoint says. ``trust`` allows code that the model brings along to run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with loading(model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        if not any(
            is_vptq_section(getattr(config, key, None) or {}) for key in ("quantization_config", "quant_config")
        ):
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype or "auto", trust_remote_code=trust)
            return loaded.to(device).eval(), AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
    folder = checkpoint_folder(model)
    _, specs = read_config(folder)
    for key in ("quantization_config", "quant_config"):
        if hasattr(config, key):
            delattr(config, key)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    loaded = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    lost = _fill(loaded, dense_tensors(folder, specs, dtype))
    if lost:
        raise VPTQFormatError(str(folder), f"tensors do not fit the model: {', '.join(lost[:3])}")
    loaded.tie_weights()
    return loaded.to(device).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)


@torch.no_grad()
def _fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Gives a model its tensors, one at a time; the names of those that it lacks, or does not know in this shape."""
    own = model.state_dict()
    missing = dict.fromkeys(own)
    unexpected = []
    for name, tensor in tensors:
        if name in own and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
            missing.pop(name, None)
        else:
            unexpected.append(name)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return [*(name for name in missing if name not in tied), *unexpected]


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """A model that can be called on a device; gives whether it is there whole, for it may come block by block."""
    whole = fits(model, device)
    blocks = [] if whole else [block.module for block in decoder_blocks(model)]
    with streamed(model, blocks, device):
        yield whole


def windows_at_once(model: nn.Module, context: int, device: torch.device) -> int:
    """Windows for one pass of a model that comes to a GPU block by block: every pass reads all of it."""
    vocabulary = model.config.get_text_config().vocab_size
    logits = 2 * 4 * context * vocabulary  # its own and the reference's, in float32
    widths = (sum(linear.out_features for linear in block.linears.values()) for block in decoder_blocks(model))
    # About what a block makes of a window: the outputs of its linears, and as much again between them.
    activations = 2 * 4 * context * max(widths)
    return max(1, min(_WINDOWS, free_memory(device) // 2 // (logits + activations)))


def context_of(models: Sequence[str], asked: int | None, trust: bool = False, most: int = _CONTEXT) -> int:
    """Tokens in a window that every model has positions for: those asked for, or up to ``most``.

    Reads configurations only. QuantizeError for a model without one, and if more are asked for than one has.
    """
    from transformers import AutoConfig

    context = asked or most
    for name in models:
        with loading(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or context
        if asked is not None and asked > positions:
            raise QuantizeError(f"--context {asked}: {name} has {positions} positions")
        context = min(context, positions)
    return context


def evaluation_text(name: str | None) -> str:
    """The text to evaluate on: a file, ``wikitext2``, or by default the language reference that ships with Python.

    The default needs no network. wikitext2 is read through ``datasets``; it and WikiText's own file (``wiki.test.raw``)
    are joined by blank lines, the way GPTQ's scripts and hence everybody's figures do.
    """
    if name is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    if name == "wikitext2":
        from datasets import load_dataset

        try:
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
        except Exception as error:  # whatever the hub client raises without a network
            raise QuantizeError("wikitext2 could not be downloaded; give --text a file") from error
        return "\n\n".join(rows)
    path = Path(name)
    if not path.is_file():
        raise QuantizeError(f"text {name} is no file")
    text = path.read_text(encoding="utf8", errors="replace")
    if path.name.startswith("wiki."):
        return "\n\n".join(line + "\n" if line.strip() else "" for line in text.split("\n"))
    return text


@dataclass(frozen=True)
class Score:
    """What a model makes of a text: its perplexity, and how far its predictions are from another model's.

    ``divergence`` is the mean Kullback-Leibler divergence of the next token's distribution, in nats, from the
    reference's; None without one. ``tokens`` are those that were predicted.
    """

    perplexity: float
    divergence: float | None
    tokens: int


@torch.inference_mode()
def score(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    context: int = 1024,
    tokens: int = 40960,
    progress: Callable[[int, int], None] = lambda done, total: None,
    reference: nn.Module | None = None,
    at_once: int = 1,
) -> Score:
    """Scores non-overlapping windows of ``context`` tokens, the first token of each aside, ``at_once`` in a pass."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0][:tokens]
    # Gemma reads nothing sensible without its opening token.
    opening = [tokenizer.bos_token_id] if "gemma" in model.config.model_type else []
    step = context - len(opening)
    starts = range(0, len(ids) - step + 1, step)
    if not starts:
        raise QuantizeError(f"the text has {len(ids)} tokens, fewer than one window of {context}")
    windows = torch.tensor([opening + ids[start : start + step].tolist() for start in starts])
    total, divergence, done = 0.0, 0.0, 0
    for batch in windows.to(model.get_input_embeddings().weight.device).split(at_once):
        logits = model(batch, use_cache=False).logits
        aims = [None] * len(batch) if reference is None else reference(batch, use_cache=False).logits
        for window, own, aim in zip(batch, logits, aims, strict=True):
            found = torch.log_softmax(own[:-1].float(), -1)
            total += float(nn.functional.nll_loss(found, window[1:], reduction="sum"))
            if aim is not None:
                wanted = torch.log_softmax(aim[:-1].float(), -1)
                divergence += float(nn.functional.kl_div(found, wanted, reduction="sum", log_target=True))
        done += len(batch)
        progress(done, len(windows))
    count = len(windows) * (context - 1)
    return Score(math.exp(total / count), divergence / count if reference is not None else None, count)


def perplexity(model: nn.Module, tokenizer: Any, text: str, context: int = 1024, tokens: int = 40960) -> float:
    """exp of the mean negative log likelihood over non-overlapping windows, the first token of each aside."""
    return score(model, tokenizer, text, context, tokens).perplexity
