"""What evaluation found of a checkpoint, kept beside it for the card: ``vptq_results.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantize.errors import QuantizeError
from quantize.export import read_config
from quantize.parts import write_text

_RESULTS = "vptq_results.json"
Results = dict[str, tuple[float | None, float]]
"""Measures by name: of the original, None where it has none, and of the checkpoint."""


def read_results(checkpoint: Path) -> Results:
    """What is kept of a checkpoint; nothing where nothing was."""
    path = checkpoint / _RESULTS
    try:
        rows = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
        return {str(name): (before, float(after)) for name, (before, after) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise QuantizeError(f"{path} is damaged ({error}); remove it") from error


def require_checkpoint(checkpoint: Path) -> None:
    """QuantizeError or VPTQFormatError where results cannot be kept: no directory with a VPTQ checkpoint."""
    if not checkpoint.is_dir():
        raise QuantizeError(f"--record writes into a checkpoint's directory, and {checkpoint} is none")
    read_config(checkpoint)


def add_results(checkpoint: Path, original: Mapping[str, float], found: Mapping[str, float]) -> None:
    """Keeps measures of a VPTQ checkpoint beside those of its original."""
    rows = read_results(checkpoint) | {name: (original.get(name), value) for name, value in found.items()}
    write_text(checkpoint / _RESULTS, json.dumps(rows, indent=1) + "\n")
