"""Fixtures for all files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub client is imported, and for every process that a test starts


@pytest.fixture(scope="session")
def stories() -> Path:
    """stories15M, a real model of 15M float32 weights: 6 layers, 6 heads of 48, hidden 288, tied embedding."""
    from tests.engines import fetch

    return fetch("stories15m")
