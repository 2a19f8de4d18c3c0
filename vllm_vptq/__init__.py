"""VPTQ models in vLLM: ``vllm serve MODEL --quantization vptq``."""

from __future__ import annotations


def register() -> None:
    """Entry point ``vllm.general_plugins``: vLLM calls it once in every process it starts."""
    # Imported here: the entry point also runs in processes that never build a model, and format.py needs no vLLM.
    from vllm_vptq import compat, config

    config.register()
    compat.recognise_early_configs()
