"""The CUDA sources compile for every generation of GPU that they are written for. Needs nvcc, but no GPU."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vllm_vptq.build import BuildError, cpu
from vllm_vptq.build.cache import sources
from vllm_vptq.build.errors import first_error
from vllm_vptq.build.toolkit import NVCC_FLAGS, Toolkit, find_toolkit, gencode

ARCHITECTURES = ("8.0", "9.0a", "10.0a")


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    try:
        return find_toolkit()
    except BuildError as error:
        pytest.skip(str(error))


def test_kernels_compile(toolkit: Toolkit, tmp_path: Path) -> None:
    def compile_one(file: Path, architecture: str) -> str | None:
        target = tmp_path / f"{file.stem}-{architecture}.o"
        command = [toolkit.nvcc, *NVCC_FLAGS, *gencode([architecture]), f"-I{sources()}", "-c", file, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and target.exists():
            return None
        return f"{file.name} for {architecture}: {first_error(done.stdout + done.stderr)}"

    files = [*sorted((sources() / "cuda").glob("*.cu")), *sorted((sources() / "quantize").glob("*.cu"))]
    assert files
    with ThreadPoolExecutor(2) as pool:
        wrong = pool.map(compile_one, *zip(*[(file, name) for file in files for name in ARCHITECTURES], strict=True))
        assert [message for message in wrong if message] == []


def test_bindings_compile(toolkit: Toolkit, tmp_path: Path) -> None:
    # A torch without CUDA ships c10's headers for CUDA all the same, but for one that its build writes; it only says
    # which symbols to export.
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.touch()
    torch_headers = Path(torch.__file__).parent / "include"
    includes = [torch_headers, torch_headers / "torch" / "csrc" / "api" / "include", toolkit.root / "include", tmp_path]
    system = [word for folder in includes for word in ("-isystem", str(folder))]
    files = sorted(sources().glob("*.cpp"))
    assert files
    for file in files:
        command = [cpu.compiler(), "-std=c++20", "-fsyntax-only", f"-I{sources()}", *system, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, first_error(done.stderr)
