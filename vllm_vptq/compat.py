"""What differs between the vLLM versions we support (0.25.1 to 0.33), and what vLLM has no hook for."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_vptq.format import is_vptq_section

logger = logging.getLogger("vllm." + __name__)  # vLLM's handler shows it

_COMPILE_KEY = "vllm_vptq"
OVERLAP = "TORCHINDUCTOR_ENABLE_PDL"
"""Torch's own variable: whether its compiled kernels start while those before them drain. If set, it decides."""


def is_routed_experts(layer: Any) -> bool:
    """Whether a layer is vLLM's holder of routed expert weights (``RoutedExperts``, in some versions ``FusedMoE``)."""
    return any(base.__name__ in ("RoutedExperts", "FusedMoE") for base in type(layer).__mro__)


def recognise_early_configs() -> None:
    """Lets plain ``vllm serve DIR`` find generation F0, whose section is called ``quant_config``.

    vLLM asks a plugin about the section named ``quantization_config`` only. Where it reads that section it is given
    ours. Without the method to extend (a future version), F0 still loads with ``--quantization vptq``.
    """
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase as Convertor

    original = getattr(Convertor, "_normalize_quantization_config", None)
    if original is None or getattr(original, "reads_vptq_f0", False):
        return

    def normalize(self: Any, config: Any) -> Any:
        early = getattr(config, "quant_config", None)
        if getattr(config, "quantization_config", None) is None and isinstance(early, dict) and is_vptq_section(early):
            config.quantization_config = {"quant_method": "vptq", "config_for_layers": dict(early)}
        return original(self, config)

    normalize.reads_vptq_f0 = True  # type: ignore[attr-defined]
    Convertor._normalize_quantization_config = normalize


def reload_in_place(layer: torch.nn.Module, finished: Callable[[], None]) -> bool:
    """Lets vLLM's weight reload give a layer's tensors to the layer's own loaders; False if this vLLM has no such hook.

    vLLM's layer-wise reload takes a layer's parameters away, counts the elements that loaders copy into new ones, and
    copies the outcome over the old. Our loaders copy nothing into parameters and put reloaded weights in place
    themselves, so the layer (and each module below it) must look as if it needed none of that. ``finished`` is called
    at the end of every reload.
    """
    try:
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
        from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
    except ImportError:
        return False

    class LoadsItself(LayerReloadingInfo):
        def can_load(self) -> bool:
            return True  # as if under way: vLLM then leaves the parameters alone

        def reset(self) -> None:
            finished()

    for module in layer.modules():
        # As many elements as awaited have come: nothing is left to process.
        LAYERWISE_INFO[module] = LoadsItself(({}, {}), torch.get_default_device(), load_numel=1, load_numel_total=1)
    return True


def current_config() -> Any:
    """The ``VllmConfig`` that a model is being made or loaded for; None outside of vLLM's engine."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def add_to_compile_key(config: Any, name: str, constants: object) -> None:
    """Makes vLLM's compile cache tell apart models whose graphs hold other constants in layer ``name``.

    A layer's plan, or its name, and the sizes of its tensors are constants of the compiled graph. They depend on the
    layout and, for the sliced lists of a large book, on the indices themselves, and vLLM's key of the cache knows of
    neither: a directory quantized anew, or another layout, would run with the graph of the former, and read where its
    weights are not. ``config`` is the one that the layer was made under: within a multimodal model it is a copy, and
    the copy is what is hashed.
    """
    if config is None:
        return
    if not isinstance(config.additional_config, dict):
        logger.warning("additional_config is no dict; set VLLM_DISABLE_COMPILE_CACHE=1 when weights or layout change")
        return
    before = config.additional_config.get(_COMPILE_KEY, "")
    digest = hashlib.sha256(repr((before, name, constants)).encode()).hexdigest()
    config.additional_config[_COMPILE_KEY] = digest


def overlaps_by_default() -> bool:
    """Whether kernels that torch compiles may start while those before them drain, here: from Hopper on."""
    from torch._inductor import config as inductor

    able = hasattr(inductor.triton, "enable_pdl") and torch.cuda.is_available()
    return able and torch.cuda.get_device_capability()[0] >= 9


def overlap_compiled_kernels(config: Any) -> None:
    """Lets the kernels that torch compiles between ours start while ours drain, as ours do.

    1 to 3 % of a decoding step at batch 1 (docs/serving.md); dense models do not gain, and torch leaves it off. A
    setting in vLLM's own ``inductor_compile_config`` stays; torch's variable goes there, that vLLM's compile cache may
    tell the settings apart.
    """
    setting = os.environ.get(OVERLAP)
    if config is not None and (setting is not None or overlaps_by_default()):
        options = config.compilation_config.inductor_compile_config
        options.setdefault("triton.enable_pdl", setting is None or setting == "1")


def cpu_offload_option() -> str | None:
    """The option by which vLLM was asked to keep weights in CPU memory, or None."""
    offload = getattr(current_config(), "offload_config", None)
    if offload is None:
        return None
    if offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size > 0:
        return "--offload-group-size"
    return "--cpu-offload-gb" if offload.uva.cpu_offload_gb > 0 else None


def foreign_load_format() -> str | None:
    """vLLM's load format if it fills a layer's parameters itself; None if tensors come through our loaders."""
    load = getattr(current_config(), "load_config", None)
    foreign = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")
    return load.load_format if load is not None and load.load_format in foreign else None


def batch_invariant_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """In vLLM's batch-invariant mode, its product of a dense linear layer on GPUs; None otherwise."""
    from vllm import envs
    from vllm.platforms import current_platform

    if not envs.VLLM_BATCH_INVARIANT or not current_platform.is_cuda_alike():
        return None
    from vllm.model_executor.layers.linear import linear_batch_invariant  # where both versions have it

    return linear_batch_invariant
