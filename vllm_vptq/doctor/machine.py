"""The machine: its processor, its GPUs as torch and as the driver see them, and its compilers."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vptq.build import BuildError, cpu
from vllm_vptq.build.cuda import ninja_folder
from vllm_vptq.build.toolkit import OLDEST, Capability, find_toolkit, fitting_toolkit
from vllm_vptq.doctor.fact import Fact
from vllm_vptq.layouts import choice, memory, stationary

if TYPE_CHECKING:
    import torch

# Those that a kernel here or a library below it makes use of; a processor lists a hundred.
_INSTRUCTIONS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, and how many of it there are.

    ``layouts`` of weights may be chosen for it; ``most_entries``: of books that its shared memory holds.
    """

    name: str
    capability: Capability
    memory: int
    layouts: tuple[str, ...]
    most_entries: int
    count: int = 1

    def __str__(self) -> str:
        major, minor = self.capability
        many = f"{self.count} × " if self.count > 1 else ""
        return f"{many}{self.name}, compute capability {major}.{minor}, {self.memory / 2**30:.0f} GiB"


def processor() -> Fact:
    """Its name and the instruction sets that matter."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text(errors="replace").splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Fact("CPU", " ".join([f"{name};", *(flag for flag in _INSTRUCTIONS if flag in flags)]))


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return ()
    kinds = Counter(_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return tuple(replace(gpu, count=count) for gpu, count in kinds.items())


def _gpu(device: torch.device) -> Gpu:
    import torch

    properties, hardware = torch.cuda.get_device_properties(device), stationary.Gpu.of(device)
    capability = (properties.major, properties.minor)
    layouts = choice.available(device)
    return Gpu(properties.name, capability, properties.total_memory, layouts, hardware.most_entries)


def gpu_facts(seen: tuple[Gpu, ...]) -> list[Fact]:
    """The GPUs and their driver; a GPU that the driver knows and torch does not is a fault worth a line."""
    import torch

    smi = nvidia_smi()
    facts = [fact for gpu in seen for fact in (Fact("GPU", str(gpu), True), _layouts_fact(gpu))]
    if not seen and not smi:
        facts.append(Fact("GPU", "none"))
    elif not seen:
        cure = (
            f"install the driver that CUDA {torch.version.cuda} needs, and check CUDA_VISIBLE_DEVICES"
            if torch.version.cuda
            else "install vLLM's package for GPUs, which brings a torch with CUDA"
        )
        facts.append(Fact("GPU", f"{smi[0][0]}, seen by the driver and not by torch", False, cure))
    if smi:
        facts.append(Fact("driver", smi[0][1]))
    return facts


def _layouts_fact(gpu: Gpu) -> Fact:
    """Which kernels a GPU gets, by the layouts they read."""
    if gpu.capability < OLDEST:
        return Fact("layouts", "none")
    value = ", ".join(gpu.layouts)
    if gpu.layouts == (memory.COMPACT,):
        value += (
            f", which saves memory and is slower than dense weights; {choice.LAYOUT}={memory.STATIONARY}, for books of "
            f"up to {gpu.most_entries} entries, is meant to be faster, but has never run on such a GPU"
        )
    return Fact("layouts", value)


def toolkit_fact(torch_cuda: str | None) -> Fact:
    """nvcc, and whether it fits torch; without CUDA in torch there is nothing to fit."""
    try:
        found = fitting_toolkit(torch_cuda) if torch_cuda else find_toolkit()
    except BuildError as error:
        return Fact("CUDA toolkit", str(error), False) if torch_cuda else Fact("CUDA toolkit", "none")
    return Fact("CUDA toolkit", f"{found.version} ({found.nvcc})", True if torch_cuda else None)


def compiler_fact() -> Fact:
    """The C++ compiler."""
    try:
        first = cpu.compiler_version().splitlines()[:1]
        return Fact("C++ compiler", f"{cpu.compiler()} ({first[0] if first else 'says no version'})", True)
    except BuildError as error:
        return Fact("C++ compiler", str(error), False)


def ninja_fact() -> Fact:
    """ninja, which only CUDA kernels need."""
    try:
        return Fact("ninja", ninja_folder(), True)
    except BuildError as error:
        return Fact("ninja", str(error), False)


def cards() -> list[str]:
    """The GPUs that processes may be given, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(len(nvidia_smi()))] if chosen is None else [c for c in chosen.split(",") if c]


def nvidia_smi() -> list[tuple[str, str]]:
    """Name and driver version of every GPU; nothing where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.rpartition(",") for line in done.stdout.splitlines() if "," in line)
    return [(name.strip(), driver.strip()) for name, _, driver in rows]
