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
        *(software.own_fact(), software.python_fact(), software.torch_fact(), software.vllm_fact(version)),
        *software.command_facts(version),
        plugin,
        *(machine.processor(), *machine.gpu_facts(gpus)),
        *(machine.compiler_fact(), machine.toolkit_fact(torch.version.cuda), machine.ninja_fact()),
        *map(native.cpu_fact, native.cpu_library_names()),
        *([extension, *map(native.cuda_library_fact, native.cuda_library_names())] if extension else []),
        *software.variable_facts(),
    ]
    verdicts = [_verdict("CPU", [software.vllm_fact(version, "CPUs"), plugin, native.cpu_fact(native.SERVING)])]
    layout = software.layout_fault()
    for gpu in gpus:
        assert extension
        kernels = extension
        if gpu.capability < OLDEST:
            kernels = Fact("CUDA kernels", f"need compute capability {OLDEST[0]}.{OLDEST[1]}", False, "use a newer GPU")
        needs = [software.vllm_fact(version, "GPUs"), plugin, kernels, *([layout] if layout else [])]
        verdicts.append(_verdict(gpu.name, needs))
    return Report(tuple(facts), tuple(verdicts))


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
