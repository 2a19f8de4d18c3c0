"""Builds the CUDA kernels while installing, where torch with CUDA and nvcc are at hand; all else is in pyproject.toml.

That takes ``pip install --no-build-isolation .``: an ordinary build environment holds no torch, and must not download
one. Everywhere else the package is pure Python and builds its kernels at first use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

# A build backend runs this file without its folder on the path.
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from vllm_vptq.build import BuildError, cuda, plain_cuda, toolkit  # noqa: E402


def say_later(what: str, error: Exception) -> None:
    print(f"vllm-vptq: {what} will be built at first use ({error})", file=sys.stderr)


def build_optional(found: toolkit.Toolkit, csrc: Path, target: Path, names: tuple[str, ...]) -> None:
    """The quantizer's libraries, into the package: an installation without them is whole."""
    for source in plain_cuda.source_files(csrc):
        try:
            plain_cuda.install(found, source, target, names)
        except BuildError as error:
            say_later(f"CUDA library {source.stem}", error)


def ahead_of_time() -> dict[str, Any]:
    """What ``setup`` needs to build the extension; nothing where that is not possible."""
    try:
        import torch

        if torch.version.cuda is None or not cuda.source_files(ROOT / "csrc"):
            return {}
        found = toolkit.fitting_toolkit(torch.version.cuda)
    except (ImportError, BuildError) as error:
        say_later("CUDA kernels", error)
        return {}
    # Before torch's builder is imported, which looks for the toolkit in its own way.
    os.environ["CUDA_HOME"] = str(found.root)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = toolkit.parse_architectures(named) if named else toolkit.supported(found, toolkit.AHEAD_OF_TIME)

    class Build(BuildExtension):
        """Leaves beside the library what it was built from, for the check at load, and those of the quantizer."""

        def run(self) -> None:
            super().run()
            target = Path(self.get_ext_fullpath(extension.name)).parent
            (target / cuda.MANIFEST).write_text(cuda.manifest(ROOT / "csrc", names))
            build_optional(found, ROOT / "csrc", target, names)

    extension = CUDAExtension(
        "vllm_vptq._C",
        [str(file.relative_to(ROOT)) for file in cuda.source_files(ROOT / "csrc")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": ["-O3"], "nvcc": [*toolkit.NVCC_FLAGS, *toolkit.gencode(names)]},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**ahead_of_time())
