"""Fixtures for all files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stories() -> Path:
    """stories15M, a real model of 15M float32 weights: 6 layers, 6 heads of 48, hidden 288, tied embedding."""
    from tests.engines import fetch

    return fetch("stories15m")
