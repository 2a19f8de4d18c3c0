"""Finds or builds the native CPU libraries: plain C++ with a C interface, compiled at first use and cached.

No torch headers: a library compiles in seconds, fits every torch, and is called through ctypes. The cache
key is the source, the compiler and, where it matters, the processor, so that a change of any of them builds anew.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from vllm_vptq.build.cache import build_once, contents, folder, key, sources
from vllm_vptq.build.errors import BuildError, first_error

_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
_OWN_FLAGS = {
    # -ffast-math would let the compiler ignore the infinities that mark excluded centroids; reassociation is enough to
    # vectorise sums and minima.
    "assign": ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", _NATIVE],
    # For any processor: it chooses its instruction set when it runs.
    "linear": ["-ffp-contract=fast"],
}


@cache
def cpu_library(name: str) -> ctypes.CDLL:
    """The library built from ``csrc/cpu/NAME.cpp``; BuildError with the remedy if it cannot be built."""
    return ctypes.CDLL(str(build(name)))


def build(name: str) -> Path:
    """Builds the library, unless it is there, and gives its path."""
    target = library_path(name)
    build_once(target, lambda private: _compile(_source(name), private))
    return target


def library_path(name: str) -> Path:
    """Where ``cpu_library`` keeps the library, built or not yet."""
    built_from = contents([_source(name), *_source(name).parent.glob("*.h")])
    flags = _flags(name)
    processor = _processor() if _NATIVE in flags else platform.machine()
    return folder() / f"{name}-{key(built_from, compiler_version(), ' '.join(flags), processor)}.so"


def compiler() -> str:
    """The C++ compiler; BuildError if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler found (tried $CXX, c++, g++, clang++); install one, for example g++")


def compiler_version() -> str:
    """What the C++ compiler says of itself; its first line names it."""
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout


def _source(name: str) -> Path:
    return sources() / "cpu" / f"{name}.cpp"


def _flags(name: str) -> list[str]:
    return [*_FLAGS, *_OWN_FLAGS[name]]


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()


def _compile(source: Path, private: Path) -> Path:
    built = private / f"{source.stem}.so"
    command = [compiler(), *_flags(source.stem), str(source), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} could not build {source.name}: {first_error(done.stderr)}")
    return built
