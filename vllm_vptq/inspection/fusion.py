"""Modules that vLLM makes one layer of, by the names that Llama, Mistral, Qwen and their kin use."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_vptq.layouts.memory import module_of
from vllm_vptq.layouts.passes import wide_kinds
from vllm_vptq.layouts.work import Kind
from vllm_vptq.specs import LayerSpec

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def mixed_books(specs: Mapping[str, LayerSpec]) -> tuple[tuple[str, ...], ...]:
    """The names of modules that are fused and have books of different kinds: one kernel then serves all kinds.

    Modules whose own books are of several kinds count where their neighbours' are of others.
    """
    kinds = {spec: _kinds(spec) for spec in set(specs.values())}
    found = []
    for name in specs:
        parent, dot, leaf = name.rpartition(".")
        for leaves in _FUSED:
            members = tuple(member for other in leaves if (member := f"{parent}{dot}{other}") in specs)
            first = members[:1] == (name,) and leaf in leaves
            if first and len({kinds[specs[member]] for member in members}) > 1:
                found.append(members)
    return tuple(found)


def _kinds(spec: LayerSpec) -> frozenset[Kind]:
    return frozenset(kind for segment in module_of(spec).segments for kind in wide_kinds(segment))
