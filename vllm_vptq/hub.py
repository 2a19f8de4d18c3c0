"""Checkpoints by their names on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_vptq.specs import VPTQFormatError, read_layer_specs

_WANTED = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
"""What the checkpoint's readers take: weights, configurations, tokenizers, code; no weights in other formats."""


def checkpoint_folder(name: str) -> Path:
    """The directory of a checkpoint: ``name`` itself, or of a hub's OWNER/NAME where it lies in the hub's cache.

    What is not in the cache is downloaded, once its configuration says that it is VPTQ. VPTQFormatError if it does not
    or if there is no download.
    """
    if Path(name).exists() or name.count("/") != 1:
        return Path(name)
    config = _from_hub(name, lambda hub: hub.hf_hub_download(name, "config.json"))
    try:
        said = json.loads(config.read_text(encoding="utf8"))
    except ValueError as error:
        raise VPTQFormatError(name, f"no readable config.json ({error})") from error
    if not isinstance(said, dict):
        raise VPTQFormatError(name, f"config.json holds a {type(said).__name__}, expected a table")
    read_layer_specs(said)
    return _from_hub(name, lambda hub: hub.snapshot_download(name, allow_patterns=_WANTED))


def _from_hub(name: str, download: Callable[[Any], str]) -> Path:
    try:
        import huggingface_hub

        return Path(download(huggingface_hub))
    except Exception as error:  # whatever the hub client raises, from HTTP errors to a missing network, or none of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VPTQFormatError(name, f"no such directory, so it was looked up on the hub: {reason}") from error
