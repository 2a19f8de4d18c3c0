"""Finds or builds the CUDA extension, which registers the GPU kernels of the ops in ``torch.ops.vllm_vptq``.

A library built when installing is used if it fits this torch, these GPUs and these sources. Otherwise one is built at
first use, for the GPUs present, and kept in the cache under a key of all that it depends on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_vptq.build.cache import build_once, contents, folder, key, logger, package, sources
from vllm_vptq.build.cpu import compiler, compiler_version
from vllm_vptq.build.errors import BuildError, first_error
from vllm_vptq.build.toolkit import (
    NVCC_FLAGS,
    OLDEST,
    Capability,
    Toolkit,
    architecture,
    fitting_toolkit,
    runs_on,
    targets,
)

NAME = "vllm_vptq_cuda"
MANIFEST = "_C.json"
"""Beside a library built ahead of time: what it was built from and for."""


@dataclass(frozen=True)
class Extension:
    """The library that serves the GPUs present: built ahead of time, cached, or still to be built by ``toolkit``."""

    path: Path
    architectures: tuple[str, ...]
    ahead_of_time: bool
    toolkit: Toolkit | None = None
    passed_over: str = ""
    """Why a library that was built ahead of time is not used; empty if there is none."""

    @property
    def built(self) -> bool:
        return self.path.exists()


def cuda_extension() -> None:
    """Makes the CUDA kernels of ``torch.ops.vllm_vptq`` available; BuildError with the remedy if that is not possible.

    To be called where CUDA may be initialised, so not in a process that forks workers.
    """
    if failure := _outcome():
        raise BuildError(failure)


@cache
def _outcome() -> str | None:
    # Failures are kept too: a model asks once for every layer.
    import torch

    try:
        extension = locate()
        build(extension)
        torch.ops.load_library(str(extension.path))
    except BuildError as error:
        return str(error)
    except OSError as error:
        # torch's own words name the file only.
        return f"{extension.path} does not load ({error.__cause__ or error}); remove it to have it built anew"
    return None


def locate() -> Extension:
    """The extension for the GPUs present, without building it; BuildError if there is none and none can be built."""
    import torch

    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} has no CUDA; install vLLM's package for GPUs, which brings one")
    present = gpus()
    library = next(package().glob("_C*.so"), None)
    ahead, passed_over = installed(library, package() / MANIFEST, fingerprint(sources()), _made_for(), present)
    if ahead:
        return ahead
    if not source_files(sources()):
        raise BuildError(f"no CUDA sources in {sources()}; install vllm-vptq again")
    try:
        toolkit = fitting_toolkit(torch.version.cuda)
        ninja_folder()
    except BuildError as error:
        # Whoever built a library when installing wants to know first why that one is not used.
        raise BuildError(f"the installed kernels were {passed_over}; {error}" if passed_over else str(error)) from None
    names = targets(toolkit, present)
    name = key(
        fingerprint(sources()),
        *(torch.__version__, torch.version.cuda, toolkit.version, compiler_version()),
        *(*NVCC_FLAGS, *names),
    )
    return Extension(folder() / f"{NAME}-{name}.so", names, False, toolkit, passed_over)


def build(extension: Extension) -> None:
    """Builds the extension into the cache, unless it is there, or waits for the process that does."""
    build_once(extension.path, lambda private: _compile(extension, private))


def source_files(source: Path) -> list[Path]:
    """What is compiled: torch's bindings, and kernels that know nothing of torch."""
    kernels = sorted((source / "cuda").glob("*.cu"))
    return [*sorted(source.glob("*.cpp")), *kernels] if kernels else []


def fingerprint(source: Path) -> str:
    """A name for the sources, headers included."""
    headers = [*source.glob("*.h"), *(source / "cuda").glob("*.cuh"), *(source / "cuda").glob("*.h")]
    return key(contents([*source_files(source), *headers]))


def manifest(source: Path, architectures: tuple[str, ...]) -> str:
    """What ``setup.py`` writes beside the extension that it builds."""
    return describe(fingerprint(source), _made_for(), architectures)


def _made_for() -> tuple[str, str]:
    import torch

    # A library for another torch may load all the same, and crash later.
    return "torch", torch.__version__


def describe(built_from: str, made_for: tuple[str, str], architectures: tuple[str, ...]) -> str:
    """What ``setup.py`` writes beside a library: the name of its sources, what it needs, and the GPUs it is for.

    ``made_for`` names what must be of the same version where the library is used, and that version.
    """
    needs, version = made_for
    return json.dumps({"sources": built_from, needs: version, "architectures": architectures}, indent=1)


def installed(
    library: Path | None, description: Path, built_from: str, made_for: tuple[str, str], present: list[Capability]
) -> tuple[Extension | None, str]:
    """The library that ``setup.py`` built, if there is one that fits; else why it is passed over."""
    if library is None or not (library.exists() and description.exists()):
        return None, ""
    made = json.loads(description.read_text())
    needs, version = made_for
    if (found := made.get(needs, "unknown")) != version:
        return None, f"built for {needs} {found}, this is {version}"
    if made["sources"] != built_from:
        return None, "built from other sources"
    names = tuple(made["architectures"])
    if missing := [architecture(gpu) for gpu in present if not runs_on(names, gpu)]:
        return None, f"built for {', '.join(names)}, not for {', '.join(missing)}"
    return Extension(library, names, True), ""


def gpus() -> list[Capability]:
    """The different kinds of GPU present that the kernels run on."""
    import torch

    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if not found:
        raise BuildError("torch sees no GPU; check nvidia-smi, the driver, and CUDA_VISIBLE_DEVICES")
    if fit := sorted(gpu for gpu in found if gpu >= OLDEST):
        return fit
    names = ", ".join(map(architecture, sorted(found)))
    raise BuildError(f"the GPUs here have compute capability {names}; the kernels need {architecture(OLDEST)} or more")


def _estimate(files: int, architectures: int) -> int:
    """Seconds, roughly: files take 20 by themselves, the largest 45, and nvcc one architecture after another."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    return architectures * max(45, math.ceil(20 * files / jobs))


def _compile(extension: Extension, private: Path) -> Path:
    # In a process of its own: torch's builder changes the environment and locks in its own way, a compiler that eats
    # the memory does not take the worker along, and the library, which the builder always loads, is loaded (so proved
    # to load) there, while here loading it a second time under its final name would register every op twice.
    assert extension.toolkit
    log, names = extension.path.with_suffix(".log"), extension.architectures
    estimate = _estimate(len(source_files(sources())), len(names))
    logger.info("Building CUDA kernels for %s: about %d s, once", ", ".join(names), estimate)
    started = time.perf_counter()
    command = [sys.executable, "-m", "vllm_vptq.build.extension", str(sources()), str(private), *names]
    with log.open("w") as out:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(extension.toolkit),
            check=False,
        )
    if done.returncode:
        raise BuildError(f"CUDA kernels do not build: {first_error(log.read_text())} (all of it in {log})")
    logger.info("CUDA kernels built in %.0f s: %s", time.perf_counter() - started, extension.path)
    return private / f"{NAME}.so"


def _environment(toolkit: Toolkit) -> dict[str, str]:
    # torch looks for ninja on the path, where it is not if python was called by its full name; and python finds this
    # package where this process did.
    return {
        **os.environ,
        "CUDA_HOME": str(toolkit.root),
        "CXX": compiler(),
        "PATH": os.pathsep.join([ninja_folder(), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package().parent), os.environ.get("PYTHONPATH")])),
    }


def ninja_folder() -> str:
    """Where ninja is; BuildError if it is nowhere."""
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(ninja.BIN_DIR)
    if found := shutil.which("ninja"):
        return str(Path(found).parent)
    raise BuildError("ninja is missing, which builds the CUDA kernels; pip install ninja")
