"""Native code: finds it or builds it, once, and loads it.

``cpu_library`` gives plain C++ behind a C interface; ``cuda_extension`` registers the CUDA kernels of the ops in
``torch.ops.vllm_vptq``; ``cuda_library`` gives CUDA code behind a C interface. Nothing here imports torch before it is
needed: ``setup.py`` uses it where there is none.
"""

from __future__ import annotations

from vllm_vptq.build.cpu import cpu_library
from vllm_vptq.build.cuda import cuda_extension
from vllm_vptq.build.errors import BuildError
from vllm_vptq.build.plain_cuda import cuda_library

__all__ = ["BuildError", "cpu_library", "cuda_extension", "cuda_library"]
