"""What the steps of a run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.devices import Done, Job, Share, ignore, share
from quantize.model import Block
from quantize.parts import Parts
from quantize.recipe import Recipe
from quantize.report import Report

BATCH_TOKENS = 2048
_GPU_BATCH_TOKENS = 8192
"""Where no gradients are taken: a GPU does so many as soon as it is told of them."""


@dataclass
class Run:
    """A model on its way, with what is known and done of it."""

    model: Any
    tokenizer: Any
    blocks: list[Block]
    recipe: Recipe
    parts: Parts
    report: Report
    ids: Tensor
    """Calibration tokens int64 ``[sequences, context]``, on the first device."""
    trained_ids: Tensor
    """Those that training end to end takes: the same, and others after them where a text goes on."""
    devices: list[torch.device]
    """What layers are coded on; the first one runs the blocks."""
    cluster: Share | None = None
    """Other machines to code layers on."""
    curvatures: dict[str, Tensor] = field(default_factory=dict)
    """Of linears whose output rows are coupled, see ``curvature.py``."""

    def share(self, jobs: Sequence[Job], done: Done = ignore) -> list:
        """Has jobs done by the cluster, or by the devices: their results, in order."""
        return (self.cluster or partial(share, self.devices))(jobs, done)

    @property
    def device(self) -> torch.device:
        """The device that runs the blocks."""
        return self.devices[0]

    def id_batches(self, tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """The calibration sequences in batches of about so many tokens."""
        return self._batches(self.ids, tokens)

    def first_batches(self, tokens: int) -> list[Tensor]:
        """The first of :meth:`id_batches`, of about so many tokens in all."""
        return self.id_batches()[: max(1, tokens // BATCH_TOKENS)]

    def trained_batches(self) -> list[Tensor]:
        """The sequences that training end to end takes, a batch for a step."""
        return self._batches(self.trained_ids, self.recipe.finetune.tokens)

    def _batches(self, ids: Tensor, tokens: int) -> list[Tensor]:
        return list(ids.split(max(1, tokens // self.recipe.context)))

    def block_batches(self) -> list[Tensor]:
        """The calibration sequences as they go through the blocks."""
        larger = self.device.type == "cuda" and not self.recipe.finetune_blocks.steps
        return self.id_batches(_GPU_BATCH_TOKENS if larger else BATCH_TOKENS)

    def trained(self, name: str) -> dict[str, Tensor]:
        """What the training of the block changed that a module or parameter is in; nothing if there was none."""
        block = next((block for block in self.blocks if name.startswith(f"{block.name}.")), None)
        part = None if block is None else tuned_part(block)
        return self.parts.load(part) if part is not None and part in self.parts else {}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A finished layer's tensors, as its block's training left them."""
        tensors, trained = self.parts.load(name), self.trained(name)
        tensors |= {key: trained[f"{name}.{key}"] for key in tensors if f"{name}.{key}" in trained}
        return tensors


def tuned_part(block: Block) -> str:
    """The name of the part that holds what a block's training changed."""
    return f"{block.name}.tuned"
