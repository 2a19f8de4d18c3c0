"""Checkpoints by their names on the hub."""

from __future__ import annotations

from pathlib import Path

from vllm_vptq.specs import VPTQFormatError


def checkpoint_folder(name: str) -> Path:
    """The directory of a checkpoint: ``name`` itself, or of a hub's OWNER/NAME where it lies in the hub's cache.

    What is not in the cache is downloaded. VPTQFormatError if it can't be.
    """
    if Path(name).exists() or name.count("/") != 1:
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name))
    except Exception as error:  # whatever the hub client raises, from HTTP errors to a missing network, or none of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VPTQFormatError(name, f"no such directory, so it was looked up on the hub: {reason}") from error
