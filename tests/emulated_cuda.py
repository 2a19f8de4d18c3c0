"""CUDA sources without CUDA: compiled by the C++ compiler against ``emulated_cuda.h``, to check what they compute."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from vllm_vptq.build import cpu
from vllm_vptq.build.cache import sources

_LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)\s*<<<([^;]*?), ([\w *]+), 0, stream>>>\((.*?)\);", re.DOTALL)


def emulated(name: str, folder: Path, **constants: int) -> ctypes.CDLL:
    """The library of ``csrc/quantize/NAME.cu``, whose functions take pointers to ordinary memory.

    ``constants`` replace those of the source.
    """
    source = (sources() / "quantize" / f"{name}.cu").read_text()
    for constant, value in constants.items():
        source, found = re.subn(rf"(constexpr int {constant} = )\w+;", rf"\g<1>{value};", source)
        assert found == 1, constant

    def call(launch: re.Match[str]) -> str:
        kernel, grid, threads, arguments = launch.groups()
        waits = "true" if "__sync" in _body(source, kernel.partition("<")[0]) else "false"
        return f"emulate({grid}, {threads}, {waits}, [=] {{ {kernel}({arguments}); }});"

    rewritten, launches = _LAUNCH.subn(call, source.replace("#include <cuda_runtime.h>", '#include "emulated_cuda.h"'))
    assert launches and "<<<" not in rewritten
    file, library = folder / f"{name}.cpp", folder / f"{name}.so"
    file.write_text(rewritten)
    folders = [f"-I{Path(__file__).parent}", f"-I{sources() / 'quantize'}"]
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", *folders]
    done = subprocess.run([cpu.compiler(), *flags, file, "-o", library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    return ctypes.CDLL(str(library))


def _body(source: str, kernel: str) -> str:
    """From a kernel's name to the next definition."""
    start = re.search(rf"\b{kernel}\(const", source)
    assert start, kernel
    return source[start.start() : source.index("\n}\n", start.start())]
