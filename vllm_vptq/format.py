"""The VPTQ checkpoint format, and nothing else: no vLLM, no kernels.

A linear layer ``W [out_features, in_features]`` is cut into vectors of ``v`` consecutive *output* rows of one
column. Each vector is an index into a codebook of ``k`` centroids, optionally plus an index into a residual
codebook. Columns may be split into groups with a codebook each, the first columns may be coded by an outlier
codebook, columns may be stored permuted, and the result may be scaled and shifted per column or per row.

Everything that reads or writes checkpoints goes through the names in ``__all__``; ``dequantize`` is the oracle
that every kernel and layout is tested against. Format: microsoft/VPTQ (https://arxiv.org/abs/2409.17066).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_vptq.packing import pack_indices, unpack_indices

__all__ = [
    "LayerSpec",
    "LayerSpecs",
    "VPTQFormatError",
    "as_index",
    "column_blocks",
    "dequantize",
    "effective_bits",
    "pack_indices",
    "read_layer_specs",
    "tensor_shapes",
    "unpack_indices",
    "validate",
]

Tensors = Mapping[str, Tensor]
"""The tensors of one module, by their name below it: ``indices``, ``centroids.weight``, ..."""

MIN_VECTOR, MAX_VECTOR = 2, 16
MAX_CENTROIDS = 1 << 16
_BOOK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class VPTQFormatError(ValueError):
    """A checkpoint that is not what it says. One line: the module, what was found, what was expected."""

    def __init__(self, module: str, what: str) -> None:
        super().__init__(f"{module or '<module>'}: {what}")
        self.module = module


# ---------------------------------------------------------------------------------------------------------------
# Layer specifications


@dataclass(frozen=True)
class LayerSpec:
    """How one linear layer is stored. Sizes are those of the whole, unsharded layer.

    ``group_num`` codebooks serve ``group_size`` consecutive *stored* columns each, after the first
    ``outlier_size`` stored columns, which have a codebook of their own (``outlier_vector_len``,
    ``num_outlier_centroids``). ``num_res_centroids`` 0 means no residual book. ``norm_dim`` 0 scales input columns,
    1 scales output rows. ``in_features`` and ``out_features`` may be None for a spec shared by leaf name; give
    them with :meth:`with_shape` before use.
    """

    in_features: int | None
    out_features: int | None
    vector_len: int
    num_centroids: int
    num_res_centroids: int = 0
    group_num: int = 1
    outlier_size: int = 0
    outlier_vector_len: int = 0
    num_outlier_centroids: int = 0
    enable_norm: bool = False
    norm_dim: int = 0
    enable_perm: bool = False
    is_indice_packed: bool = True
    indices_as_float: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of a main index, log2 of ``num_centroids``."""
        return self.num_centroids.bit_length() - 1

    @property
    def res_bits(self) -> int:
        """Bits of a residual index, 0 without a residual book."""
        return self.num_res_centroids.bit_length() - 1 if self.num_res_centroids else 0

    @property
    def total_bits(self) -> int:
        """Bits of a merged index in the packed stream, at most 32."""
        return self.index_bits + self.res_bits

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``; ValueError while they are unknown."""
        if self.in_features is None or self.out_features is None:
            raise ValueError("in_features and out_features are not set; use with_shape")
        return self.out_features, self.in_features

    @property
    def group_size(self) -> int:
        """Columns that share one main codebook."""
        return (self.shape[1] - self.outlier_size) // self.group_num

    def with_shape(self, out_features: int, in_features: int, name: str = "") -> LayerSpec:
        """This spec for a layer of the given size; VPTQFormatError if the spec names another."""
        for key, want, have in (
            ("out_features", out_features, self.out_features),
            ("in_features", in_features, self.in_features),
        ):
            if have is not None and have != want:
                raise VPTQFormatError(name, f"the configuration has {key} {have}, the model {want}")
        spec = replace(self, in_features=in_features, out_features=out_features)
        _check_columns(spec, name)
        return spec

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> LayerSpec:
        """Reads one layer's dict of any configuration generation.

        Keys that only inform (``bias``, ``enable_proxy_error``) are ignored. An unknown key that is switched off
        (None, False, 0, -1, empty) is ignored too; one that asks for something raises VPTQFormatError, since
        ignoring it could change the weights.
        """
        return _spec_from_config(cls, config, name)

    def to_config(self) -> dict[str, Any]:
        """The layer's dict as the reference implementation writes it (generations F1 and F2)."""
        config: dict[str, Any] = {
            "vector_lens": [self.outlier_vector_len or -1, self.vector_len],
            "num_centroids": [self.num_outlier_centroids or -1, self.num_centroids],
            "num_res_centroids": [-1, self.num_res_centroids or -1],
            "group_num": self.group_num,
            "outlier_size": self.outlier_size,
            "enable_norm": self.enable_norm,
            "enable_perm": self.enable_perm,
            "is_indice_packed": self.is_indice_packed,
            "indices_as_float": self.indices_as_float,
            "vector_quant_dim": "out",
        }
        if self.norm_dim:
            # The reference's main branch refuses the key, so it is written only where it says something.
            config["norm_dim"] = self.norm_dim
        if self.in_features is not None and self.out_features is not None:
            config |= {
                "in_features": self.in_features,
                "out_features": self.out_features,
                "group_size": self.group_size,
            }
        return config


_SIZE_KEYS = {"in_features", "out_features", "vector_lens", "num_centroids", "num_res_centroids"}
_COLUMN_KEYS = {"group_num", "group_size", "outlier_size", "enable_norm", "norm_dim", "enable_perm"}
_STORAGE_KEYS = {"is_indice_packed", "indices_as_float", "vector_quant_dim"}
_IGNORED_KEYS = {"bias", "enable_proxy_error"}
_KNOWN_KEYS = _SIZE_KEYS | _COLUMN_KEYS | _STORAGE_KEYS | _IGNORED_KEYS


def _spec_from_config(cls: type[LayerSpec], config: Mapping[str, Any], name: str) -> LayerSpec:
    def integer(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise VPTQFormatError(name, f"{key} is {value!r}, expected an integer")
        return value

    def pair(key: str) -> tuple[int, int]:
        value = config.get(key)
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise VPTQFormatError(name, f"{key} is {value!r}, expected [outlier, main]")
        return integer(key, value[0]), integer(key, value[1])

    def optional(key: str) -> int | None:
        value = config.get(key)
        return None if value is None else integer(key, value)

    def flag(key: str, default: bool) -> bool:
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            raise VPTQFormatError(name, f"{key} is {value!r}, expected true or false")
        return default if value is None else value

    unknown = [k for k, v in config.items() if k not in _KNOWN_KEYS and v not in (None, False, 0, -1, "", [], {})]
    if unknown:
        raise VPTQFormatError(name, f"unknown key {unknown[0]!r} = {config[unknown[0]]!r} in the layer's configuration")
    if config.get("vector_quant_dim") not in (None, "out"):
        raise VPTQFormatError(name, f"vector_quant_dim {config['vector_quant_dim']!r}; only 'out' exists in the format")

    (v0, v), (k0, k), (_, r) = pair("vector_lens"), pair("num_centroids"), pair("num_res_centroids")
    outliers = max(optional("outlier_size") or 0, 0)
    spec = cls(
        in_features=optional("in_features"),
        out_features=optional("out_features"),
        vector_len=v,
        num_centroids=k,
        num_res_centroids=max(r, 0),
        group_num=integer("group_num", config.get("group_num", 1)),
        outlier_size=outliers,
        outlier_vector_len=v0 if outliers else 0,
        num_outlier_centroids=k0 if outliers else 0,
        enable_norm=flag("enable_norm", False),
        norm_dim=optional("norm_dim") or 0,
        enable_perm=flag("enable_perm", False),
        is_indice_packed=flag("is_indice_packed", True),
        indices_as_float=flag("indices_as_float", False),
    )
    _check_spec(spec, name)
    group_size = optional("group_size")
    if spec.in_features is not None and group_size not in (None, -1, spec.group_size):
        raise VPTQFormatError(name, f"group_size {group_size}, expected {spec.group_size} from the other keys")
    return spec


def _check_spec(spec: LayerSpec, name: str) -> None:
    def require(ok: bool, what: str) -> None:
        if not ok:
            raise VPTQFormatError(name, what)

    def power_of_two(n: int) -> bool:
        return 2 <= n <= MAX_CENTROIDS and n & (n - 1) == 0

    require(
        MIN_VECTOR <= spec.vector_len <= MAX_VECTOR,
        f"vector length {spec.vector_len}, expected {MIN_VECTOR} to {MAX_VECTOR}",
    )
    expected = f"expected a power of two from 2 to {MAX_CENTROIDS}"
    require(power_of_two(spec.num_centroids), f"num_centroids {spec.num_centroids}, {expected}")
    require(
        not spec.num_res_centroids or power_of_two(spec.num_res_centroids),
        f"num_res_centroids {spec.num_res_centroids}, {expected}, or -1 for none",
    )
    require(spec.group_num >= 1, f"group_num {spec.group_num}, expected at least 1")
    require(spec.norm_dim in (0, 1), f"norm_dim {spec.norm_dim}, expected 0 (columns) or 1 (rows)")
    if spec.outlier_size:
        require(
            MIN_VECTOR <= spec.outlier_vector_len <= MAX_VECTOR,
            f"outlier vector length {spec.outlier_vector_len}, expected {MIN_VECTOR} to {MAX_VECTOR}",
        )
        require(
            1 <= spec.num_outlier_centroids <= MAX_CENTROIDS,
            f"{spec.num_outlier_centroids} outlier centroids, expected 1 to {MAX_CENTROIDS}",
        )
    for key in ("in_features", "out_features"):
        size = getattr(spec, key)
        require(size is None or size > 0, f"{key} {size}, expected a positive size")
    if spec.in_features is not None:
        _check_columns(spec, name)


def _check_columns(spec: LayerSpec, name: str) -> None:
    assert spec.in_features is not None
    rest = spec.in_features - spec.outlier_size
    if rest < spec.group_num or rest % spec.group_num:
        raise VPTQFormatError(
            name,
            f"{spec.in_features} columns less {spec.outlier_size} outliers do not divide into {spec.group_num} groups",
        )


class LayerSpecs(Mapping[str, LayerSpec]):
    """Module name -> spec. ``specs[name]`` also finds a shared layer by the last component of its name."""

    def __init__(
        self,
        layers: Mapping[str, LayerSpec],
        shared: Mapping[str, LayerSpec] | None = None,
        modules_to_not_convert: tuple[str, ...] = (),
    ) -> None:
        self.layers = dict(layers)
        self.shared = dict(shared or {})
        self.modules_to_not_convert = tuple(modules_to_not_convert)

    def _excluded(self, name: str) -> bool:
        # transformers' rule: an entry names a module, one above it, or a leaf ("lm_head", "o_proj").
        return any(
            name == m or name.startswith(m + ".") or f".{m}." in f".{name}." for m in self.modules_to_not_convert
        )

    def __getitem__(self, name: str) -> LayerSpec:
        if not self._excluded(name):
            if name in self.layers:
                return self.layers[name]
            leaf = name.rpartition(".")[2]
            if leaf in self.shared:
                return self.shared[leaf]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.layers if not self._excluded(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_layer_specs(hf_config: Mapping[str, Any]) -> LayerSpecs:
    """Finds the layer specs in a model's ``config.json`` (or in its ``quantization_config`` alone).

    Reads all four generations (F0 ``quant_config``, F0b a bare ``quantization_config``, F1 ``config_for_layers``,
    F2 ``shared_layer_config``), at the top or in ``text_config``. Raises VPTQFormatError if there is none.
    """
    for holder in (hf_config, hf_config.get("text_config") or {}):
        for key in ("quantization_config", "quant_config"):
            section = holder.get(key)
            if isinstance(section, Mapping) and is_vptq_section(section):
                return _read_section(section)
    if is_vptq_section(hf_config):
        return _read_section(hf_config)
    raise VPTQFormatError(
        "config.json", "no VPTQ configuration: neither quantization_config nor quant_config holds one"
    )


def is_vptq_section(section: Mapping[str, Any]) -> bool:
    """Whether a configuration section is VPTQ's, of whichever generation."""
    method = section.get("quant_method")
    if method:
        return bool(method == "vptq")
    return "config_for_layers" in section or _is_bare(section)


def _is_bare(section: Mapping[str, Any]) -> bool:
    """F0 and F0b: nothing but layers by name (and the empty quant_method that vLLM adds to those without one)."""
    layers = [c for key, c in section.items() if key != "quant_method"]
    return bool(layers) and all(isinstance(c, Mapping) and "num_centroids" in c for c in layers)


def _read_section(section: Mapping[str, Any]) -> LayerSpecs:
    def specs(key: str, table: Any) -> dict[str, LayerSpec]:
        if not isinstance(table, Mapping):
            raise VPTQFormatError("config.json", f"{key} is a {type(table).__name__}, expected a table of layers")
        for name, config in table.items():
            if not isinstance(config, Mapping):
                raise VPTQFormatError(name, f"its entry in {key} is a {type(config).__name__}, expected a table")
        return {name: LayerSpec.from_config(config, name) for name, config in table.items()}

    section = {key: value for key, value in section.items() if key != "quant_method"}
    if _is_bare(section):
        return LayerSpecs(specs("quant_config", section))
    unknown = set(section) - {"config_for_layers", "shared_layer_config", "modules_to_not_convert"}
    if unknown:
        raise VPTQFormatError("config.json", f"unknown key {min(unknown)!r} in the VPTQ configuration")
    layers = specs("config_for_layers", section.get("config_for_layers") or {})
    shared = specs("shared_layer_config", section.get("shared_layer_config") or {})
    if not layers and not shared:
        raise VPTQFormatError("config.json", "config_for_layers and shared_layer_config are both empty")
    return LayerSpecs(layers, shared, tuple(section.get("modules_to_not_convert") or ()))


# ---------------------------------------------------------------------------------------------------------------
# Tensors of one module


def tensor_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor a module of this spec must have on disk, ``bias`` aside."""
    out, cols = spec.shape
    v, groups, gs = spec.vector_len, spec.group_num, spec.group_size
    rows = math.ceil(out / v)
    width = math.ceil(gs * spec.total_bits / 32) if spec.is_indice_packed else gs
    shapes: dict[str, tuple[int, ...]] = {
        "indices": (groups, rows, width),
        "centroids.weight": (groups, spec.num_centroids * v),
    }
    if spec.num_res_centroids:
        shapes["res_centroids.weight"] = (groups, spec.num_res_centroids * v)
        if not spec.is_indice_packed:
            shapes["res_indices"] = (groups, rows, gs)
    if spec.outlier_size:
        v0 = spec.outlier_vector_len
        shapes["outlier_centroids.weight"] = (1, spec.num_outlier_centroids * v0)
        shapes["outlier_indices"] = (1, math.ceil(out / v0), spec.outlier_size)
    if spec.enable_perm:
        shapes["perm"] = (cols,)
    if spec.enable_norm:
        length = cols if spec.norm_dim == 0 else out
        shapes["weight_scale"] = shapes["weight_bias"] = (length,)
    return shapes


def effective_bits(spec: LayerSpec, book_bits: int = 16) -> float:
    """Stored bits per weight: indices, codebooks, norm and permutation, books in ``book_bits``-bit floats."""
    shapes = tensor_shapes(spec)
    widths = {"indices": 32 if spec.is_indice_packed else 16, "res_indices": 16, "outlier_indices": 16, "perm": 16}
    out, cols = spec.shape
    return sum(math.prod(s) * widths.get(n, book_bits) for n, s in shapes.items()) / (out * cols)


def as_index(tensor: Tensor) -> Tensor:
    """Indices as int64, whatever 16-bit disguise they are stored in (int16, uint16 or float16 bits)."""
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.uint16):
        tensor = tensor.view(torch.int16)
    if tensor.dtype == torch.int16:
        return tensor.to(torch.int64) & 0xFFFF
    return tensor.to(torch.int64)


def validate(name: str, tensors: Tensors, spec: LayerSpec) -> None:
    """Checks one module's tensors against its spec, so that nothing behind this can read outside a book.

    Raises VPTQFormatError naming ``name``, the tensor, what was found and what was expected: missing or unknown
    tensors, shapes, dtypes, non-finite books or norms, indices beyond their book, a permutation that is none.
    """
    shapes = tensor_shapes(spec)
    for missing in shapes.keys() - tensors.keys():
        raise VPTQFormatError(name, f"tensor {missing} is missing, expected shape {list(shapes[missing])}")
    for extra in tensors.keys() - shapes.keys() - {"bias"}:
        raise VPTQFormatError(name, f"unknown tensor {extra}; its configuration expects {', '.join(sorted(shapes))}")
    for key, shape in shapes.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise VPTQFormatError(name, f"tensor {key} has shape {list(tensor.shape)}, expected {list(shape)}")
        allowed = _allowed_dtypes(key, spec)
        if tensor.dtype not in allowed:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise VPTQFormatError(
                name, f"tensor {key} is {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}"
            )
        if allowed is _BOOK_DTYPES and not bool(torch.isfinite(tensor).all()):
            raise VPTQFormatError(name, f"tensor {key} holds NaN or infinite values, expected finite ones")

    def in_book(key: str, size: int) -> None:
        index = as_index(tensors[key])
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise VPTQFormatError(
                name, f"tensor {key} holds index {low if low < 0 else high}, expected 0 to {size - 1}"
            )

    if not spec.is_indice_packed:  # a packed index has just the bits of its book
        in_book("indices", spec.num_centroids)
        if spec.num_res_centroids:
            in_book("res_indices", spec.num_res_centroids)
    if spec.outlier_size:
        in_book("outlier_indices", spec.num_outlier_centroids)
    if spec.enable_perm:
        perm = as_index(tensors["perm"]).sort().values
        if not torch.equal(perm, torch.arange(perm.numel(), device=perm.device)):
            raise VPTQFormatError(name, f"tensor perm is no permutation of 0 to {perm.numel() - 1}")


def _allowed_dtypes(key: str, spec: LayerSpec) -> tuple[torch.dtype, ...]:
    if key == "indices" and spec.is_indice_packed:
        return (torch.int32,)
    if key.endswith("indices"):
        return (torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32, torch.int64)
    if key == "perm":
        return (torch.int16, torch.uint16, torch.int32, torch.int64)
    return _BOOK_DTYPES


# ---------------------------------------------------------------------------------------------------------------
# Values


@dataclass(frozen=True)
class ColumnBlock:
    """Columns that share one pair of books: a group, or the outliers.

    ``columns`` int64 ``[C]`` holds the original column of each stored one, ``book`` ``[k, v]`` and ``res_book``
    ``[r, v]`` (or None) the centroids in the dtype on disk. Indices stay as stored until :meth:`read`, for a large
    layer's do not fit the memory one would like to spend on them.
    """

    columns: Tensor
    book: Tensor
    res_book: Tensor | None
    index_bits: int
    res_bits: int
    stored: Tensor
    """``[R, words]`` int32 if ``packed``, else ``[R, C]`` 16-bit."""
    stored_res: Tensor | None
    packed: bool

    @property
    def vector_rows(self) -> int:
        """R, the number of vectors in a column."""
        return self.stored.shape[0]

    def read(self, lo: int, hi: int, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """Main and residual indices int64 ``[hi - lo, C]`` of the vector rows from ``lo`` to ``hi``."""
        stored = self.stored[lo:hi].to(device)
        if not self.packed:
            return as_index(stored), None if self.stored_res is None else as_index(self.stored_res[lo:hi].to(device))
        merged = unpack_indices(stored, self.index_bits + self.res_bits, self.columns.numel())
        if not self.res_bits:
            return merged, None
        return merged & ((1 << self.index_bits) - 1), merged >> self.index_bits


def column_blocks(tensors: Tensors, spec: LayerSpec) -> Iterator[ColumnBlock]:
    """A module's column blocks, outliers first. The tensors must pass :func:`validate`."""
    _, cols = spec.shape
    device = tensors["indices"].device
    natural = as_index(tensors["perm"]) if spec.enable_perm else torch.arange(cols, device=device)
    ol, gs, v = spec.outlier_size, spec.group_size, spec.vector_len
    if ol:
        book = tensors["outlier_centroids.weight"].reshape(-1, spec.outlier_vector_len)
        bits = max(1, (spec.num_outlier_centroids - 1).bit_length())
        yield ColumnBlock(natural[:ol], book, None, bits, 0, tensors["outlier_indices"][0], None, packed=False)
    for g in range(spec.group_num):
        has_residual = spec.num_res_centroids > 0
        yield ColumnBlock(
            columns=natural[ol + g * gs : ol + (g + 1) * gs],
            book=tensors["centroids.weight"][g].reshape(-1, v),
            res_book=tensors["res_centroids.weight"][g].reshape(-1, v) if has_residual else None,
            index_bits=spec.index_bits,
            res_bits=spec.res_bits,
            stored=tensors["indices"][g],
            stored_res=tensors["res_indices"][g] if has_residual and not spec.is_indice_packed else None,
            packed=spec.is_indice_packed,
        )


def dequantize(tensors: Tensors, spec: LayerSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[out_features, in_features]`` a module stands for, computed in ``dtype`` (float32 or float64).

    ``y = x @ dequantize(...).T`` is the linear. The tensors must pass :func:`validate`.
    """
    out, cols = spec.shape
    weight = torch.empty(out, cols, dtype=dtype, device=tensors["indices"].device)
    for block in column_blocks(tensors, spec):
        # Columns in natural order are written as a slice; only a gap in them needs an index.
        order = block.columns.argsort()
        columns = block.columns[order]
        first, last = int(columns[0]), int(columns[-1])
        where: slice | Tensor = slice(first, last + 1) if last - first + 1 == columns.numel() else columns
        book = block.book.to(dtype)
        res_book = None if block.res_book is None else block.res_book.to(dtype)
        v = book.shape[1]
        step = max(1, (1 << 20) // (v * columns.numel()))  # a million weights at a time stay in cache
        for lo in range(0, block.vector_rows, step):
            index, residual = block.read(lo, lo + step)
            part = torch.nn.functional.embedding(index[:, order], book)
            if residual is not None and res_book is not None:
                part += torch.nn.functional.embedding(residual[:, order], res_book)
            rows = part.transpose(1, 2).reshape(-1, columns.numel())[: out - lo * v]
            weight[lo * v : lo * v + rows.shape[0], where] = rows
    if spec.enable_norm:
        scale, shift = tensors["weight_scale"].to(dtype), tensors["weight_bias"].to(dtype)
        if spec.norm_dim == 1:
            scale, shift = scale[:, None], shift[:, None]
        weight.mul_(scale).add_(shift)
    return weight
