"""Finds or builds the native CPU libraries: plain C++ with a C interface, compiled at first use and cached.

No torch headers: a library compiles in a second or two, fits every torch, and is called through ctypes. The cache
key is the source, the compiler and the processor, so that a change of any of them builds anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

# -ffast-math would let the compiler ignore the infinities that mark excluded centroids; reassociation is enough to
# vectorise sums and minima.
_FLAGS = (
    ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
    + ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
    + (["-march=native"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"])
)


class BuildError(RuntimeError):
    """A native library that could not be built, and what to do about it."""


@cache
def cpu_library(name: str) -> ctypes.CDLL:
    """The library built from ``csrc/cpu/NAME.cpp``; BuildError with the remedy if it cannot be built."""
    source = _sources() / "cpu" / f"{name}.cpp"
    compiler = _compiler()
    target = _cache() / f"{name}-{_key(source, compiler)}.so"
    if not target.exists():
        _compile(source, compiler, target)
    return ctypes.CDLL(str(target))


def _sources() -> Path:
    """``csrc``: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler found (tried $CXX, c++, g++, clang++); install one, for example g++")


def _cache() -> Path:
    base = os.environ.get("VLLM_VPTQ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(base) / "vllm_vptq"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [source.read_text(), version, " ".join(_FLAGS), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()


def _compile(source: Path, compiler: str, target: Path) -> None:
    # Into a file of its own, then renamed: several workers may start at once, and none must see half a library.
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as file:
        partial = Path(file.name)
    try:
        command = [compiler, *_FLAGS, str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise BuildError(f"{compiler} could not build {source.name}: {first}")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
