"""A machine with GPUs, a toolkit and a compiler that are not there: what build and doctor ask is answered by these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_vptq.build import cuda

_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_90\\ncompute_100\\n' ;;
  *) for last; do :; done; echo library > "$last" ;;
esac
"""
# In place of python: notes that it ran, takes a moment, and leaves what `python -m vllm_vptq.build.extension` leaves.
_BUILDER = """#!/bin/sh
echo "$@" >> {calls}
sleep 0.3
{action}
"""


@dataclass
class FakeMachine:
    """Change what is in it, then ask ``build`` or ``doctor``."""

    monkeypatch: pytest.MonkeyPatch
    folder: Path

    def gpus(self, *capabilities: tuple[int, int]) -> None:
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        self.monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(
                name="Fake GPU",
                major=capabilities[device.index][0],
                minor=capabilities[device.index][1],
                total_memory=80 * 2**30,
                multi_processor_count=99,
                shared_memory_per_block_optin=(227 if capabilities[device.index][0] in (9, 10) else 163) * 1024,
            ),
        )

    def toolkit(self, version: str) -> None:
        root = self.folder / f"cuda-{version}"
        (root / "bin").mkdir(parents=True)
        (root / "include").mkdir()
        (root / "include" / "cuda_runtime_api.h").touch()
        script(root / "bin" / "nvcc", _NVCC.format(version=version))
        self.monkeypatch.setenv("CUDA_HOME", str(root))

    def builder(self, action: str) -> None:
        """Shell commands that run in place of a build; $4 is the folder for the library, $5 the first architecture."""
        builder = self.folder / "builder"
        script(builder, _BUILDER.format(calls=self.folder / "calls", action=action))
        self.monkeypatch.setattr(cuda, "sys", SimpleNamespace(executable=str(builder)))

    @property
    def builds(self) -> list[str]:
        """The arguments of every build so far."""
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def source(self) -> Path:
        return self.folder / "csrc"

    @property
    def package(self) -> Path:
        return self.folder / "package"


def write_sources(folder: Path) -> None:
    """As little as counts as the source of an extension."""
    for part in ("cuda", "quantize"):
        (folder / part).mkdir(parents=True)
    kernels = ("cuda/kernel.cu", "cuda/device.cuh", "cuda/kernel.h", "quantize/assign.cu", "quantize/coded.cu")
    for name in ("bindings.cpp", "shared.h", *kernels):
        (folder / name).write_text(f"// {name}\n")


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
