"""The git checkout that the package runs from, if it does."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """The commit, short, with ``-dirty`` if files differ from it; None outside of a checkout, or without git."""
    if not (ROOT / ".git").exists():  # an installed package may lie in a checkout of something else
        return None
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
