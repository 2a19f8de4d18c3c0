"""The fixture of a machine with a GPU that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fake_cuda import FakeMachine, write_sources
from vllm_vptq.build import cuda, plain_cuda


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeMachine:
    """One H100, CUDA 13.0 in torch and outside it, sources that compile, an empty cache and an untouched package."""
    fake = FakeMachine(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("VLLM_VPTQ_CACHE", str(tmp_path / "cache"))
    fake.gpus((9, 0))
    fake.toolkit("13.0")
    fake.builder(f'echo library > "$4/{cuda.NAME}.so"')
    write_sources(fake.source)
    fake.package.mkdir()
    for module in (cuda, plain_cuda):
        monkeypatch.setattr(module, "sources", lambda: fake.source)
        monkeypatch.setattr(module, "package", lambda: fake.package)
    return fake
