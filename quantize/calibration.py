"""Calibration text, from where the recipe says, as token sequences of one length."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.recipe import Recipe, split_source

Progress = Callable[[int, int], None]
Row = Mapping[str, Any]
SELF = "self"

_CHARACTERS = 8
"""No tokenizer makes tokens of more on average."""
_ROLES = {"human": "user", "gpt": "assistant"}
_MIN_P = 0.02
_WHOLE = 1 << 40


def wanted_tokens(recipe: Recipe, widest: int) -> int:
    """How many calibration tokens a recipe asks for, for a model whose widest linear has so many inputs.

    Text that the model writes itself costs a pass for every token: there ``recipe.tokens`` are enough.
    """
    return recipe.tokens if writes_itself(recipe) else max(recipe.tokens, recipe.tokens_per_input * widest)


def sequences(recipe: Recipe, tokens: int) -> int:
    """How many calibration sequences hold so many tokens."""
    return -(-tokens // recipe.context)


def trained_tokens(recipe: Recipe) -> int:
    """How many tokens training end to end would see once each, where a given text has them and none are asked for.

    What moments were taken of is what the coded layers fit already: other text says more of what they have lost.
    """
    if writes_itself(recipe) or not recipe.tokens_per_input:
        return 0
    return recipe.finetune.steps * recipe.finetune.tokens


def calibration_tokens(model: Any, tokenizer: Any, recipe: Recipe, progress: Progress, widest: int = 0) -> Tensor:
    """Token ids int64 ``[sequences, context]`` for a recipe; ``progress`` is told how much text there is so far.

    There are :func:`wanted_tokens` of them, :func:`trained_tokens` if those are more, or as many as the text has, but
    not less than ``recipe.tokens``.

    Every source gives its share of consecutive sequences; those of several are shuffled, so that any part of them is a
    mixture. ``self`` is text the model writes, which needs no network and fits models of any language (the idea of
    LLM-QAT, https://arxiv.org/abs/2305.17888).
    """
    least = sequences(recipe, recipe.tokens)
    count = sequences(recipe, max(wanted_tokens(recipe, widest), trained_tokens(recipe)))
    names, weights = zip(*map(split_source, recipe.calibration or (SELF,)), strict=True)
    parts = []
    for name, share, needed in zip(names, shares(weights, count), shares(weights, least), strict=True):
        if name == SELF:
            parts.append(_self_written(model, tokenizer, share, recipe, progress))
        elif share:
            parts.append(_sequences(name, tokenizer, needed, share, recipe.context))
        else:
            parts.append(torch.empty(0, recipe.context, dtype=torch.int64))
    # What the shortest of the texts has, for its share, is what all are good for.
    while any(len(part) < share for part, share in zip(parts, shares(weights, count), strict=True)):
        count -= 1
    ids = torch.cat([part[:share] for part, share in zip(parts, shares(weights, count), strict=True)])
    if len(names) == 1:
        return ids
    return ids[torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed))]


def writes_itself(recipe: Recipe) -> bool:
    """Whether some of the text comes from the model, which then must run."""
    return not recipe.calibration or any(split_source(source)[0] == SELF for source in recipe.calibration)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """``count`` divided by weight, as whole numbers: what rounding down leaves goes to the largest remainders."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: count - sum(whole)]:
        whole[i] += 1
    return whole


def _sequences(name: str, tokenizer: Any, least: int, count: int, context: int) -> Tensor:
    """The first ``count`` sequences of a file or a data set, or as many as it has, if that is the ``least``."""
    path, wanted = Path(name), count * context
    rows = _file_rows(path) if path.is_file() else _dataset_rows(name)
    texts: list[str] = []
    size = 0
    for row in rows:
        texts.append(_text(row, tokenizer, name))
        size += len(texts[-1])
        if size >= wanted * _CHARACTERS:
            break
    text = "\n\n".join(texts)[: 2 * wanted * _CHARACTERS]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(ids) < least * context:
        raise QuantizeError(
            f"calibration text {name} has {len(ids)} tokens, {least * context} are needed; "
            "give a longer text or a smaller --tokens"
        )
    count = min(count, len(ids) // context)
    return ids[: count * context].view(count, context)


def _file_rows(path: Path) -> Iterator[Row]:
    """A text file as one row; every line of a ``.jsonl`` file as one."""
    text = path.read_text(encoding="utf8", errors="replace")
    if path.suffix != ".jsonl":
        yield {"text": text}
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise QuantizeError(f"calibration {path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise QuantizeError(f"calibration {path}, line {number}: expected a table, found {line[:40]!r}")
        yield row


def _dataset_rows(name: str) -> Iterator[Row]:
    """A data set's split, ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``; what is empty is the default."""
    from datasets import load_dataset

    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        yield from load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # whatever the hub client raises, from HTTP errors to missing files
        reason = (str(error).splitlines() or [""])[0]
        raise QuantizeError(
            f"calibration {name} is neither a text file nor a data set that could be loaded ({reason}); "
            "leave it out to calibrate on text the model writes itself"
        ) from error


def _text(row: Row, tokenizer: Any, name: str) -> str:
    """A row's text: its messages in the model's chat template, its ``text``, or its first column of strings."""
    messages = row.get("messages") or row.get("conversations")
    if isinstance(messages, list):
        if not getattr(tokenizer, "chat_template", None):
            raise QuantizeError(f"calibration {name} holds messages, and the model has no chat template")
        try:
            return str(tokenizer.apply_chat_template([_message(m) for m in messages], tokenize=False))
        except Exception as error:  # whatever a template raises that does not know such messages
            reason = " ".join(str(error).split())
            raise QuantizeError(f"calibration {name}: the model's chat template refuses a row: {reason}") from error
    column = "text" if "text" in row else next((k for k, v in row.items() if isinstance(v, str)), None)
    if column is None:
        raise QuantizeError(f"calibration {name} has no text column, only {', '.join(row)}")
    return str(row[column])


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as templates take it, also from the columns ``from`` and ``value`` that older data sets have."""
    if "role" in message or "from" not in message:
        return message
    speaker = str(message["from"])
    return {"role": _ROLES.get(speaker, speaker), "content": message.get("value")}


@torch.inference_mode()
def _self_written(model: Any, tokenizer: Any, count: int, recipe: Recipe, progress: Progress) -> Tensor:
    """Sequences sampled from the model itself, half of them from its opening token, half from a random one."""
    generator = torch.Generator().manual_seed(recipe.seed)
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    first = torch.tensor(ordinary)[torch.randint(len(ordinary), (count, 1), generator=generator)]
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if opening is not None:
        first[::2] = opening
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        return sample(model, first.to(device), recipe.context, progress).cpu()


def sample(model: Any, ids: Tensor, length: int, progress: Progress) -> Tensor:
    """Continues ``ids [n, 1]`` to ``[n, length]`` by sampling, past any end token: the length must be whole.

    min-p (https://arxiv.org/abs/2407.01082) keeps the tail out and needs no sort of the vocabulary.
    """
    from transformers import DynamicCache

    cache, step = DynamicCache(config=model.config), ids
    with _plain_attention(model):
        for done in range(1, length):
            logits = model(step, past_key_values=cache, use_cache=True).logits[:, -1].float()
            chances = torch.softmax(logits, dim=-1)
            chances *= chances >= _MIN_P * chances.amax(dim=-1, keepdim=True)
            if not bool(torch.isfinite(chances.sum(1)).all()):
                raise QuantizeError("the model's output is not finite, so it cannot write its calibration text")
            # torch.multinomial draws a number for every entry of the vocabulary, which takes longer than the model.
            # Whole numbers, because a GPU may add up others in any order.
            below = (chances.double() * _WHOLE).long().cumsum(1)
            drawn = torch.rand(len(ids), 1, dtype=torch.float64, device=below.device) * below[:, -1:]
            step = torch.searchsorted(below, drawn.long(), right=True).clamp_max(below.shape[1] - 1)
            ids = torch.cat([ids, step], dim=1)
            progress((done + 1) * len(ids), length * len(ids))
    return ids


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Attention as two products, which for one token of many sequences takes half of what torch's fused one does."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)
