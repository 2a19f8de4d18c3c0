"""vLLM's engine on GPUs with the CUDA kernels, feature by feature: ``python -m tests.engine`` (docs/serving.md).

``cases`` says what is checked, ``jobs`` what runs in a process of its own, ``worker`` is that process, ``runner``
has the cards and the time, ``compare`` decides whether two engines agree, ``models`` writes what they serve.
"""
