"""Finds or builds CUDA code behind a C interface: no torch headers; nvcc compiles it on install or at first use."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path

from vllm_vptq.build.cache import build_once, contents, folder, key, logger, package, sources
from vllm_vptq.build.cuda import Extension, describe, gpus, installed
from vllm_vptq.build.errors import BuildError, first_error
from vllm_vptq.build.toolkit import NVCC_FLAGS, Toolkit, fitting_toolkit, gencode, targets


@cache
def cuda_library(name: str) -> ctypes.CDLL:
    """The library built from ``csrc/quantize/NAME.cu`` for the GPUs present; BuildError with the remedy if it can't be.

    Its functions take the device and the stream as arguments.
    """
    library = locate(name)
    build(library, name)
    return ctypes.CDLL(str(library.path))


def locate(name: str) -> Extension:
    """The library for the GPUs present, without building it; BuildError if there is none and none can be built."""
    import torch

    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} has no CUDA; install one for GPUs")
    present, source = gpus(), _source(name)
    made_for = _made_for(torch.version.cuda)
    ahead, passed_over = installed(*_installed_files(package(), name), _fingerprint(source), made_for, present)
    if ahead:
        return ahead
    toolkit = fitting_toolkit(torch.version.cuda)
    names = targets(toolkit, present)
    target = folder() / f"{name}-cuda-{key(_fingerprint(source), toolkit.version, *NVCC_FLAGS, *names)}.so"
    return Extension(target, names, False, toolkit, passed_over)


def build(library: Extension, name: str) -> None:
    """Builds the library into the cache, unless it is there, or waits for the process that does."""
    source = _source(name)
    if not library.built:
        logger.info("Building %s for %s: about 20 s, once", source.name, ", ".join(library.architectures))

    def compile_here(private: Path) -> Path:
        assert library.toolkit
        return compile_library(library.toolkit, source, private / f"{name}.so", library.architectures)

    build_once(library.path, compile_here)


def source_files(source: Path) -> list[Path]:
    """Each is a library of its own."""
    return sorted((source / "quantize").glob("*.cu"))


def install(toolkit: Toolkit, source: Path, target: Path, architectures: tuple[str, ...]) -> None:
    """Builds a library from one file into a package that is being installed, and leaves beside it what it is."""
    library, description = _installed_files(target, source.stem)
    compile_library(toolkit, source, library, architectures)
    description.write_text(describe(_fingerprint(source), _made_for(toolkit.version), architectures))


def compile_library(toolkit: Toolkit, source: Path, target: Path, architectures: tuple[str, ...]) -> Path:
    """Compiles one file to a shared library; BuildError with the compiler's first error."""
    flags = [*NVCC_FLAGS, *gencode(architectures), "--threads=0", "-shared", "-Xcompiler", "-fPIC"]
    done = subprocess.run(
        [str(toolkit.nvcc), *flags, str(source), "-o", str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"{toolkit.nvcc} could not build {source.name}: {first_error(done.stdout + done.stderr)}")
    return target


def _source(name: str) -> Path:
    return sources() / "quantize" / f"{name}.cu"


def _made_for(cuda: str) -> tuple[str, str]:
    # Any torch will do, as the library uses none of it; but what another major CUDA built asks for a newer driver.
    return "CUDA", cuda.split(".")[0]


def _fingerprint(source: Path) -> str:
    return key(contents([source, *source.parent.glob("*.cuh")]))


def _installed_files(target: Path, name: str) -> tuple[Path, Path]:
    return target / f"{name}-cuda.so", target / f"{name}-cuda.json"
