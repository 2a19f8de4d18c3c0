"""Finds or builds CUDA code behind a C interface: no torch headers, compiled by nvcc at first use and cached."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path

from vllm_vptq.build.cache import build_once, contents, folder, key, logger, sources
from vllm_vptq.build.cuda import gpus
from vllm_vptq.build.errors import BuildError, first_error
from vllm_vptq.build.toolkit import NVCC_FLAGS, Toolkit, architecture, fitting_toolkit, gencode


@cache
def cuda_library(name: str) -> ctypes.CDLL:
    """The library built from ``csrc/quantize/NAME.cu`` for the GPUs present; BuildError with the remedy if it can't be.

    Its functions take the device and the stream as arguments.
    """
    import torch

    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} has no CUDA; install one for GPUs")
    toolkit, source = fitting_toolkit(torch.version.cuda), sources() / "quantize" / f"{name}.cu"
    names = tuple(architecture(gpu) for gpu in gpus())
    target = folder() / f"{name}-cuda-{key(contents([source]), toolkit.version, *NVCC_FLAGS, *names)}.so"
    if not target.exists():
        logger.info("Building %s for %s: about 20 s, once", source.name, ", ".join(names))
    build_once(target, lambda private: compile_library(toolkit, source, private / f"{name}.so", names))
    return ctypes.CDLL(str(target))


def compile_library(toolkit: Toolkit, source: Path, target: Path, architectures: tuple[str, ...]) -> Path:
    """Compiles one file to a shared library; BuildError with the compiler's first error."""
    flags = [*NVCC_FLAGS, *gencode(architectures), "-shared", "-Xcompiler", "-fPIC"]
    done = subprocess.run(
        [str(toolkit.nvcc), *flags, str(source), "-o", str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"{toolkit.nvcc} could not build {source.name}: {first_error(done.stdout + done.stderr)}")
    return target
