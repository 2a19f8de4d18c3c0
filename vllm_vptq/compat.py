"""What differs between the vLLM versions we support (0.25.1 to 0.33), and what vLLM has no hook for."""

from __future__ import annotations

from typing import Any

from vllm_vptq.format import is_vptq_section


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
