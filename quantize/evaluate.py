"""What dense and VPTQ checkpoints alike make of a text, through transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.errors import QuantizeError
from quantize.export import dense_tensors, read_config
from quantize.model import loading
from vllm_vptq.format import VPTQFormatError, is_vptq_section


def load_any(
    model: str, device: torch.device, dtype: torch.dtype = torch.float32, trust: bool = False
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; a VPTQ checkpoint is loaded as the dense model it stands for.

    ``trust`` allows code that the model brings along to run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(model)
    with loading(model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        if not any(
            is_vptq_section(getattr(config, key, None) or {}) for key in ("quantization_config", "quant_config")
        ):
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust)
            return loaded.to(device).eval(), AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
    _, specs = read_config(folder)
    for key in ("quantization_config", "quant_config"):
        if hasattr(config, key):
            delattr(config, key)
    loaded = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    state = dict(dense_tensors(folder, specs, dtype))
    missing, unexpected = loaded.load_state_dict(state, strict=False)
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or ())
    lost = [name for name in missing if name not in tied]
    if lost or unexpected:
        raise VPTQFormatError(str(folder), f"tensors do not fit the model: {', '.join([*lost, *unexpected][:3])}")
    loaded.tie_weights()
    return loaded.to(device).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)


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
) -> Score:
    """Scores non-overlapping windows of ``context`` tokens, the first token of each aside."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0][:tokens]
    # Gemma reads nothing sensible without its opening token.
    opening = [tokenizer.bos_token_id] if "gemma" in model.config.model_type else []
    step = context - len(opening)
    starts = range(0, len(ids) - step + 1, step)
    if not starts:
        raise QuantizeError(f"the text has {len(ids)} tokens, fewer than one window of {context}")
    total, divergence, count = 0.0, 0.0, 0
    for i, start in enumerate(starts):
        window = torch.tensor(opening + ids[start : start + step].tolist(), device=model.device)
        found = torch.log_softmax(model(window[None]).logits[0, :-1].float(), -1)
        total += float(nn.functional.nll_loss(found, window[1:], reduction="sum"))
        if reference is not None:
            wanted = torch.log_softmax(reference(window[None]).logits[0, :-1].float(), -1)
            divergence += float(nn.functional.kl_div(found, wanted, reduction="sum", log_target=True))
        count += len(window) - 1
        progress(i + 1, len(starts))
    return Score(math.exp(total / count), divergence / count if reference is not None else None, count)


def perplexity(model: nn.Module, tokenizer: Any, text: str, context: int = 1024, tokens: int = 40960) -> float:
    """exp of the mean negative log likelihood over non-overlapping windows, the first token of each aside."""
    return score(model, tokenizer, text, context, tokens).perplexity


def task_scores(model: nn.Module, tokenizer: Any, tasks: list[str], limit: int | None) -> dict[str, float]:
    """Accuracies by the LM Evaluation Harness (https://github.com/EleutherAI/lm-evaluation-harness), zero shot.

    QuantizeError without the harness, which the extra ``eval`` installs, and for tasks it doesn't know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise QuantizeError("--tasks needs the LM Evaluation Harness: pip install 'vllm-vptq[eval]'") from error
    try:
        results = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks, limit=limit)["results"]
    except (KeyError, ValueError) as error:
        raise QuantizeError(f"tasks {', '.join(tasks)}: {' '.join(str(error).split())}") from error
    accuracies = ("acc_norm,none", "acc,none", "exact_match,strict-match")
    return {
        task: float(next(values[key] for key in accuracies if key in values))
        for task, values in results.items()
        if any(key in values for key in accuracies)
    }
