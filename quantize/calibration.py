"""Calibration text, from where the recipe says, as token sequences of one length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.recipe import Recipe

Progress = Callable[[int, int], None]

_MIN_P = 0.02


def calibration_tokens(model: Any, tokenizer: Any, recipe: Recipe, progress: Progress) -> Tensor:
    """Token ids int64 ``[sequences, context]`` for a recipe; ``progress`` is told how much text there is so far.

    A text file or a data set is cut into consecutive sequences. With neither, the model writes the text itself, which
    needs no network and fits models of any language (the idea of LLM-QAT, https://arxiv.org/abs/2305.17888).
    """
    count = -(-recipe.tokens // recipe.context)
    if recipe.calibration is None:
        return _self_written(model, tokenizer, count, recipe, progress)
    path = Path(recipe.calibration)
    if path.is_file():
        text = path.read_text(encoding="utf8", errors="replace")
    else:
        text = _dataset_text(recipe.calibration, characters=count * recipe.context * 8)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(ids) < count * recipe.context:
        raise QuantizeError(
            f"calibration text {recipe.calibration} has {len(ids)} tokens, {count * recipe.context} are needed; "
            "give a longer text or a smaller --tokens"
        )
    return ids[: count * recipe.context].view(count, recipe.context)


def _dataset_text(name: str, characters: int) -> str:
    """The first texts of a data set's training split, ``NAME`` or ``NAME:CONFIG``, joined by blank lines."""
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        texts, size = [], 0
        for row in rows:
            column = "text" if "text" in row else next((k for k, v in row.items() if isinstance(v, str)), None)
            if column is None:
                raise QuantizeError(f"data set {name} has no text column, only {', '.join(row)}")
            texts.append(row[column])
            size += len(texts[-1])
            if size >= characters:
                break
    except QuantizeError:
        raise
    except Exception as error:  # whatever the hub client raises, from HTTP errors to missing files
        reason = (str(error).splitlines() or [""])[0]
        raise QuantizeError(
            f"calibration {name} is neither a text file nor a data set that could be loaded ({reason}); "
            "leave it out to calibrate on text the model writes itself"
        ) from error
    return "\n\n".join(texts)


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
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return _sample(model, first.to(model.device), recipe.context, progress).cpu()


def _sample(model: Any, ids: Tensor, length: int, progress: Progress) -> Tensor:
    """Continues ``ids [n, 1]`` to ``[n, length]`` by sampling, past any end token: the length must be whole.

    min-p (https://arxiv.org/abs/2407.01082) keeps the tail out and needs no sort of the vocabulary.
    """
    from transformers import DynamicCache

    cache, step = DynamicCache(config=model.config), ids
    for done in range(1, length):
        logits = model(step, past_key_values=cache, use_cache=True).logits[:, -1].float()
        chances = torch.softmax(logits, dim=-1)
        chances *= chances >= _MIN_P * chances.amax(dim=-1, keepdim=True)
        if not bool(torch.isfinite(chances).all()):
            raise QuantizeError("the model's output is not finite, so it cannot write its calibration text")
        step = torch.multinomial(chances, 1)
        ids = torch.cat([ids, step], dim=1)
        progress((done + 1) * len(ids), length * len(ids))
    return ids
