"""Which tensor parallel degrees a module admits: the rules of ``sharding``, asked by the names of modules.

vLLM's model code decides which layer a module becomes. Here are the names that Llama, Mistral, Qwen, Phi-3, OPT and
their kin use; of any other name nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_vptq.limits import limit_of
from vllm_vptq.sharding import IndivisibleError, qkv_shares, share

DEGREES = (1, 2, 4, 8, 16)

_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_ROWS = {"gate_proj": 1, "up_proj": 1, "fc1": 1, "gate_up_proj": 2}
"""Split by output rows, with the number of outputs that one module holds."""
_COLUMNS = ("o_proj", "out_proj", "down_proj", "fc2")


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention."""

    heads: int
    kv_heads: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Heads | None:
        """From ``config.json`` or its ``text_config``; None if they do not say."""
        for holder in (config, config.get("text_config")):
            if isinstance(holder, Mapping) and isinstance(heads := holder.get("num_attention_heads"), int):
                kv_heads = holder.get("num_key_value_heads")
                return cls(heads, kv_heads if isinstance(kv_heads, int) else heads)
        return None


def refusals(module: str, shape: tuple[int, int], heads: Heads | None) -> dict[int, str]:
    """The degrees that ``module`` of ``(out_features, in_features)`` does not admit, each with the reason."""
    found = {}
    for tp in DEGREES:
        if reason := limit_of(module) or _refusal(module, shape, heads, tp):
            found[tp] = reason
    return found


def _refusal(module: str, shape: tuple[int, int], heads: Heads | None, tp: int) -> str | None:
    leaf = module.rpartition(".")[2]
    out_features, in_features = shape
    try:
        if leaf in _ATTENTION and heads is not None:
            qkv_shares(heads.heads, heads.kv_heads, 1, 1, tp, 0)
        elif leaf in _ROWS:
            share(out_features // _ROWS[leaf], tp, 0, "output rows")
        elif leaf in _COLUMNS:
            share(in_features, tp, 0, "input columns")
        elif tp > 1:
            return f"not known here how vLLM splits {leaf}"
    except IndivisibleError as error:
        return str(error)
    return None
