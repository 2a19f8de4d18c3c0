"""Compiles the CUDA extension with torch's builder: ``python -m vllm_vptq.build.extension SOURCES FOLDER ARCH...``.

A process of its own; ``build.cuda`` starts it, says why, and chooses the arguments and the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Leaves the library in the folder, having loaded it once."""
    from torch.utils.cpp_extension import load

    from vllm_vptq.build.cuda import NAME, source_files
    from vllm_vptq.build.toolkit import NVCC_FLAGS, gencode

    source, folder, *architectures = sys.argv[1:]
    load(
        name=NAME,
        sources=[str(file) for file in source_files(Path(source))],
        extra_include_paths=[source],
        extra_cflags=["-O3"],
        extra_cuda_cflags=[*NVCC_FLAGS, *gencode(architectures)],
        build_directory=folder,
        with_cuda=True,
        is_python_module=False,
        verbose=True,
    )


if __name__ == "__main__":
    main()
