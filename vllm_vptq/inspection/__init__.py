"""Describes a VPTQ checkpoint: what each module is, what it takes, and how it can be split. Reads no tensor values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vllm_vptq.format import LayerSpec, LayerSpecs, VPTQFormatError, read_layer_specs, validate_shapes
from vllm_vptq.inspection.degrees import DEGREES, Heads, refusals
from vllm_vptq.inspection.fusion import mixed_books
from vllm_vptq.inspection.headers import read_config, read_headers
from vllm_vptq.layouts.memory import resident_bytes

__all__ = ["DEGREES", "Checkpoint", "Module", "inspect_checkpoint"]


@dataclass(frozen=True)
class Module:
    """One quantized module. ``nbytes`` is what it takes on disk: indices, books, norm and permutation, no bias.

    ``norm`` is ``columns``, ``rows`` or None. ``refused`` gives, for each tensor parallel degree of DEGREES that the
    module does not admit, the reason.
    """

    name: str
    out_features: int
    in_features: int
    format: str
    groups: int
    outliers: int
    perm: bool
    norm: str | None
    index_bits: float
    nbytes: int
    refused: Mapping[int, str] = field(hash=False)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def effective_bits(self) -> float:
        """Bits a weight on disk, books, norm and permutation included; ``index_bits`` is without them."""
        return self.nbytes * 8 / self.weights


@dataclass(frozen=True)
class Checkpoint:
    """The quantized modules in the order of the configuration, and the bytes of the tensors left dense, by kind.

    ``resident_bytes`` is what the quantized modules take in a GPU's memory, by layout. ``mixed_books`` are the modules,
    by name, that vLLM fuses though a GPU looks them up in different ways.
    """

    modules: tuple[Module, ...]
    dense_bytes: Mapping[str, int]
    resident_bytes: Mapping[str, int]
    mixed_books: tuple[tuple[str, ...], ...]

    @property
    def weights(self) -> int:
        """Quantized weights."""
        return sum(module.weights for module in self.modules)

    @property
    def quantized_bytes(self) -> int:
        return sum(module.nbytes for module in self.modules)

    @property
    def total_bytes(self) -> int:
        return self.quantized_bytes + sum(self.dense_bytes.values())

    @property
    def effective_bits(self) -> float:
        """Bits of a quantized weight, as of :attr:`Module.effective_bits`."""
        return self.quantized_bytes * 8 / self.weights

    @property
    def degrees(self) -> list[int]:
        """The tensor parallel degrees that every module admits."""
        return [tp for tp in DEGREES if not any(tp in module.refused for module in self.modules)]


def inspect_checkpoint(folder: Path) -> Checkpoint:
    """Reads config.json and the headers of the weight files in ``folder``.

    VPTQFormatError, naming a file or a module, if they cannot be read, are not VPTQ's or contradict each other.
    """
    config = read_config(folder)
    specs, heads = read_layer_specs(config), Heads.from_config(config)
    tensors = read_headers(folder)
    own, dense = _sort(tensors, specs)
    # Layers that are described by the last part of their name only are known by their tensors.
    names = list(dict.fromkeys([*specs, *own]))
    modules = tuple(_describe(name, specs[name], own.get(name, {}), heads) for name in names)
    known = {name: specs[name] for name in names}
    return Checkpoint(modules, dense, resident_bytes(known.values()), mixed_books(known))


def _sort(tensors: Mapping[str, Tensor], specs: LayerSpecs) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """The tensors of each quantized module by their names below it, and the bytes of all others by kind."""
    own: dict[str, dict[str, Tensor]] = {}
    dense = {"embeddings": 0, "head": 0, "other": 0}
    for name, tensor in tensors.items():
        parts = name.split(".")
        modules = ((".".join(parts[:cut]), ".".join(parts[cut:])) for cut in (-1, -2))
        module, key = next(((module, key) for module, key in modules if module in specs), ("", name))
        if module and key != "bias":
            own.setdefault(module, {})[key] = tensor
        else:
            dense[_kind(name)] += tensor.nbytes
    return own, dense


def _describe(name: str, spec: LayerSpec, tensors: Mapping[str, Tensor], heads: Heads | None) -> Module:
    if spec.in_features is None or spec.out_features is None:
        raise VPTQFormatError(name, "the configuration gives no in_features and out_features to tell its size by")
    validate_shapes(name, tensors, spec)
    norm = ("columns", "rows")[spec.norm_dim] if spec.enable_norm else None
    return Module(
        name=name,
        out_features=spec.out_features,
        in_features=spec.in_features,
        format=spec.format_name,
        groups=spec.group_num,
        outliers=spec.outlier_size,
        perm=spec.enable_perm,
        norm=norm,
        index_bits=spec.total_bits / spec.vector_len,
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        refused=refusals(name, spec.shape, heads),
    )


def _kind(name: str) -> str:
    if "embed" in name or name.endswith("wte.weight"):
        return "embeddings"
    return "head" if "lm_head" in name else "other"
