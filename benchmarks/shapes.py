"""The shapes of known models: what their ``config.json`` says, and the linear layers that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind. ``qkv_bias``: q, k and v have biases. ``more``: further keys of config.json."""

    architecture: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rope_theta: float
    qkv_bias: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    def cut(self, layers: int | None) -> Shape:
        """The same model with its first ``layers`` layers; None keeps all."""
        return self if layers is None else replace(self, layers=layers)

    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of each linear of a layer, by its name below ``model.layers.N``."""
        query, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def config(self, dtype: str) -> dict[str, Any]:
        """``config.json`` of the dense model. ``dtype`` is ``float16`` or ``bfloat16``."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131072,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": dtype,
            **dict(self.more),
        }


_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = ("LlamaForCausalLM", "llama")
_LLAMA_3 = (("rope_scaling", _LLAMA_3_ROPE),)
_QWEN = ("Qwen2ForCausalLM", "qwen2")

SHAPES = {
    "Llama-3.1-8B": Shape(*_LLAMA, 4096, 14336, 32, 32, 8, 128, 128256, 5e5, more=_LLAMA_3),
    "Llama-3.1-70B": Shape(*_LLAMA, 8192, 28672, 80, 64, 8, 128, 128256, 5e5, more=_LLAMA_3),
    "Qwen2.5-14B": Shape(*_QWEN, 5120, 13824, 48, 40, 8, 128, 152064, 1e6, qkv_bias=True),
    "Qwen2.5-72B": Shape(*_QWEN, 8192, 29568, 80, 64, 8, 128, 152064, 1e6, qkv_bias=True),
    "Mistral-Large-2407": Shape("MistralForCausalLM", "mistral", 12288, 28672, 88, 96, 8, 128, 32768, 1e6),
    "tiny": Shape(*_LLAMA, 256, 512, 2, 4, 2, 64, 512, 1e4),
    "tiny-qwen": Shape(*_QWEN, 256, 512, 2, 4, 2, 64, 512, 1e4, qkv_bias=True),
}
