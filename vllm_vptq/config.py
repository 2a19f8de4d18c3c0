"""``VPTQConfig``: tells vLLM which of a model's layers are quantized, and how."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_vptq.compat import is_routed_experts
from vllm_vptq.format import LayerSpec, LayerSpecs, VPTQFormatError, is_vptq_section, read_layer_specs
from vllm_vptq.layouts import choice
from vllm_vptq.limits import QUANTIZED_EXPERTS, QUANTIZED_HEAD
from vllm_vptq.linear import VPTQDequantizedLinearMethod, VPTQLinearMethod


class VPTQConfig(QuantizationConfig):
    """Quantization configuration ``vptq``, of every generation of the checkpoint format."""

    def __init__(self, specs: LayerSpecs | None = None) -> None:
        super().__init__()
        self._specs = specs
        self._applied_mappers: list[Any] = []
        self._quantized = choice.Layers()

    @property
    def specs(self) -> LayerSpecs:
        """The layer specs, by vLLM's module names once the model's mapper was applied."""
        if self._specs is None:
            raise VPTQFormatError("config.json", "no VPTQ configuration in quantization_config or quant_config")
        return self._specs

    def __repr__(self) -> str:
        return f"VPTQConfig({len(self._specs or {})} layers)"

    def get_name(self) -> str:
        return "vptq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # None: vLLM then builds an empty config and maybe_update_config fills it (generation F0).
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VPTQConfig:
        return cls(read_layer_specs(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        # Generation F0b has no quant_method; its layers speak for themselves.
        return "vptq" if isinstance(hf_quant_cfg, dict) and is_vptq_section(hf_quant_cfg) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        if self._specs is None and hf_config is not None:
            self._specs = read_layer_specs(hf_config.to_dict())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        # Outer and inner models each bring their mapper, sometimes the same one twice.
        if hf_to_vllm_mapper in self._applied_mappers:
            return
        self._applied_mappers.append(hf_to_vllm_mapper)
        specs = self.specs
        self._specs = LayerSpecs(
            hf_to_vllm_mapper.apply_dict(specs.layers),
            specs.shared,
            # Entries may be single components ("lm_head"), which a mapper of prefixes would spoil: both forms count.
            (*specs.modules_to_not_convert, *hf_to_vllm_mapper.apply_list(list(specs.modules_to_not_convert))),
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            modules = self._modules_of(prefix)
            if all(spec is None for _, spec in modules):
                return UnquantizedLinearMethod()
            if prefix.rpartition(".")[2] == "kv_b_proj":
                # vLLM's MLA reads this layer's weight itself.
                return VPTQDequantizedLinearMethod(prefix, modules, self._quantized)
            return VPTQLinearMethod(prefix, modules, self._quantized)
        if isinstance(layer, ParallelLMHead) and prefix in self.specs:
            raise VPTQFormatError(prefix, QUANTIZED_HEAD)
        if is_routed_experts(layer) and self._has_experts(prefix):
            raise VPTQFormatError(prefix, QUANTIZED_EXPERTS)
        return None

    def _has_experts(self, prefix: str) -> bool:
        expert_leaves = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
        shared = any(f"{prefix}.0.{leaf}" in self.specs for leaf in expert_leaves)
        return shared or any(name.startswith(f"{prefix}.") for name in self.specs)

    def _modules_of(self, prefix: str) -> list[tuple[str, LayerSpec | None]]:
        """The checkpoint modules behind a vLLM layer, in output order, with their specs."""
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{leaf}" if parent else leaf for leaf in leaves]
        modules = [(name, self.specs.get(name)) for name in names]
        fused_on_disk = self.specs.get(prefix)
        if fused_on_disk is not None and all(spec is None for _, spec in modules):
            return [(prefix, fused_on_disk)]
        return modules


def register() -> None:
    """Makes ``vptq`` known to vLLM; may be called more than once."""
    register_quantization_config("vptq")(VPTQConfig)
