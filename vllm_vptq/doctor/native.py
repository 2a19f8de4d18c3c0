"""The native libraries: where they are, what would happen at first use, and building them now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from vllm_vptq import cpu as cpu_kernels
from vllm_vptq.build import BuildError, cpu, cuda, plain_cuda
from vllm_vptq.build.cache import sources
from vllm_vptq.doctor.fact import Fact

SERVING = "linear"
"""The CPU library that serves; others belong to the quantizer."""


def cpu_library_names() -> list[str]:
    return sorted(source.stem for source in (sources() / "cpu").glob("*.cpp"))


def cpu_fact(name: str) -> Fact:
    title = f"CPU library {name}"
    try:
        path = cpu.library_path(name)
        if not path.exists():
            return Fact(title, "built at first use, in seconds", True)
        if name != SERVING:
            return Fact(title, str(path), True)
        return Fact(title, f"{path}, runs on {cpu_kernels.INSTRUCTION_SETS[cpu_kernels.instruction_set()]}", True)
    except RuntimeError as error:  # BuildError, or an instruction set that the processor has not
        return Fact(title, str(error), False)


def cuda_library_names() -> list[str]:
    """Those of the quantizer, which does without, several times slower."""
    return [source.stem for source in plain_cuda.source_files(sources())]


def extension_fact() -> Fact:
    """The CUDA kernels, for a machine with a GPU."""
    return _cuda_fact("CUDA kernels", cuda.locate, "in minutes")


def cuda_library_fact(name: str) -> Fact:
    """A library of the quantizer's, for a machine with a GPU."""
    return _cuda_fact(f"CUDA library {name}", partial(plain_cuda.locate, name), "in half a minute")


def _cuda_fact(title: str, locate: Callable[[], cuda.Extension], time: str) -> Fact:
    try:
        extension = locate()
    except BuildError as error:
        return Fact(title, f"cannot be built: {error}", False)
    names = ", ".join(extension.architectures)
    aside = f"; what was built when installing is passed over: {extension.passed_over}" if extension.passed_over else ""
    if extension.ahead_of_time:
        return Fact(title, f"built when installing, for {names}: {extension.path}", True)
    if extension.built:
        return Fact(title, f"built for {names}: {extension.path}{aside}", True)
    return Fact(title, f"built at first use, for {names}, {time} (doctor --build does it now){aside}", True)


def to_build(with_gpu: bool) -> list[tuple[str, Callable[[], object]]]:
    """Names of the libraries that are not there yet and can be built, each with what builds it."""
    jobs: list[tuple[str, Callable[[], object]]] = []
    for name in cpu_library_names():
        if not cpu.library_path(name).exists():
            jobs.append((f"CPU library {name}", partial(cpu.build, name)))
    if with_gpu and not (extension := cuda.locate()).built:
        jobs.append(("CUDA kernels", partial(cuda.build, extension)))
    for name in cuda_library_names() if with_gpu else ():
        # Serving does without it: where it cannot be built, as where the kernels came built, its fact says why.
        with suppress(BuildError):
            if not (library := plain_cuda.locate(name)).built:
                jobs.append((f"CUDA library {name}", partial(plain_cuda.build, library, name)))
    return jobs
