"""The CUDA toolkit: where it is, whether it fits torch, and what nvcc is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_vptq.build.errors import BuildError

# torch forbids the arithmetic operators of the 16-bit types (-D__CUDA_NO_...); undone, so that the kernels mean the
# same with nvcc alone.
_ALLOWED = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
NVCC_FLAGS = (
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo"),
    *(f"-U__CUDA_NO_{name}__" for name in _ALLOWED),
)
AHEAD_OF_TIME = ("8.0", "8.6", "8.9", "9.0a", "10.0a", "12.0+PTX")
"""Built when installing where nobody names architectures. PTX serves what comes later."""

Capability = tuple[int, int]
OLDEST: Capability = (8, 0)
"""bfloat16 and asynchronous copies begin here."""

HOPPER: Capability = (9, 0)
_OWN_FEATURES: frozenset[Capability] = frozenset({(9, 0), (10, 0), (10, 3)})
"""Whose matrix instructions (wgmma, tcgen05) exist only under the name with an 'a', which runs nowhere else."""
_ARCHITECTURE = re.compile(r"(\d+)\.(\d)a?(\+PTX)?")


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit: its folder and its version, like ``13.0``."""

    root: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"


def find_toolkit() -> Toolkit:
    """The toolkit in $CUDA_HOME, else that of nvcc on the path, else /usr/local/cuda; BuildError if there is none."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        roots = [Path(named)]
    else:
        # The link is followed second: a distribution's /usr/bin/nvcc has its headers in /usr/include. And nvcc may be
        # a script that calls one elsewhere, with no headers near it.
        nvcc = shutil.which("nvcc")
        roots = [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]] if nvcc else []
        roots.append(Path("/usr/local/cuda"))
    for root in roots:
        if (root / "bin" / "nvcc").exists() and _has_headers(root):
            return Toolkit(root, _version(root / "bin" / "nvcc"))
    where = f"CUDA_HOME is {named}, without bin/nvcc or its headers" if named else "no CUDA toolkit (nvcc) found"
    raise BuildError(f"{where}; install the toolkit of torch's CUDA version, or set CUDA_HOME to where it is")


def fitting_toolkit(torch_cuda: str) -> Toolkit:
    """The toolkit, if what it builds works with a torch built for CUDA ``torch_cuda``; BuildError otherwise."""
    toolkit = find_toolkit()
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        raise BuildError(
            f"{toolkit.nvcc} is CUDA {toolkit.version}, but torch is built for {torch_cuda}; install the CUDA toolkit "
            f"{torch_cuda} and set CUDA_HOME to it"
        )
    return toolkit


def architecture(capability: Capability) -> str:
    """The architecture to compile for, like ``8.6`` or ``9.0a``."""
    return f"{capability[0]}.{capability[1]}{'a' if capability in _OWN_FEATURES else ''}"


def parse_architectures(text: str) -> tuple[str, ...]:
    """$TORCH_CUDA_ARCH_LIST made fit for these kernels: those too old left out, and 'a' put where it is needed."""
    chosen: dict[str, None] = {}
    for word in text.replace(";", " ").split():
        if not (match := _ARCHITECTURE.fullmatch(word)):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {word} not understood; write it like 8.0;9.0a;12.0+PTX")
        capability = (int(match[1]), int(match[2]))
        if capability >= OLDEST:
            name = architecture(capability)
            # PTX of an architecture with an 'a' would run nowhere that its machine code does not.
            chosen[name if name.endswith("a") else name + (match[3] or "")] = None
    if not chosen:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={text} names nothing from {architecture(OLDEST)} on")
    return tuple(chosen)


def supported(toolkit: Toolkit, architectures: Iterable[str]) -> tuple[str, ...]:
    """Those of the architectures that this nvcc knows."""
    command = [str(toolkit.nvcc), "--list-gpu-arch"]
    known = set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())
    return tuple(name for name in architectures if f"compute_{_digits(name).rstrip('a')}" in known)


def targets(toolkit: Toolkit, present: Sequence[Capability]) -> tuple[str, ...]:
    """The architectures to compile for these GPUs; BuildError if this nvcc does not know one of them."""
    names = tuple(architecture(gpu) for gpu in present)
    known = supported(toolkit, names)
    if unknown := [name for name in names if name not in known]:
        raise BuildError(
            f"CUDA {toolkit.version} in {toolkit.root} cannot build for {', '.join(unknown)}; install a newer"
        )
    return names


def gencode(architectures: Iterable[str]) -> list[str]:
    """nvcc's options for architectures like ``8.0``, ``9.0a`` and ``12.0+PTX``."""
    flags = []
    for name in architectures:
        digits = _digits(name)
        flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    return flags


def runs_on(architectures: Sequence[str], capability: Capability) -> bool:
    """Whether code built for the architectures runs on a GPU: NVIDIA's rules of binary and PTX compatibility.

    Hopper takes its own code alone: what others' PTX becomes there lacks the kernels that use ``wgmma``.
    """
    if capability == HOPPER:
        return architecture(HOPPER) in architectures
    for name in architectures:
        match = _ARCHITECTURE.fullmatch(name)
        assert match, name
        built = (int(match[1]), int(match[2]))
        if built == capability or (match[3] and built <= capability):
            return True
        if not name.endswith("a") and built[0] == capability[0] and built <= capability:
            return True
    return False


def _digits(name: str) -> str:
    return name.removesuffix("+PTX").replace(".", "")


def _has_headers(root: Path) -> bool:
    return any(root.glob("include/cuda_runtime_api.h")) or any(root.glob("targets/*/include/cuda_runtime_api.h"))


def _version(nvcc: Path) -> str:
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    if not (match := re.search(r"release (\d+\.\d+)", said)):
        raise BuildError(f"{nvcc} --version does not say its version; is it an nvcc?")
    return match[1]
