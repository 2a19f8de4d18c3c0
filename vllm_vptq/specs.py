"""What a checkpoint's configuration says: a ``LayerSpec`` for every quantized layer, of all four generations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

MIN_VECTOR, MAX_VECTOR = 2, 16
MAX_CENTROIDS = 1 << 16


class VPTQFormatError(ValueError):
    """A checkpoint that is not what it says. One line: the module, what was found, what was expected."""

    def __init__(self, module: str, what: str) -> None:
        super().__init__(f"{module or '<module>'}: {what}")
        self.module = module


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
    def format_name(self) -> str:
        """``v8-k65536-256``: vector length, centroids, residual centroids (0 for none)."""
        return f"v{self.vector_len}-k{self.num_centroids}-{self.num_res_centroids}"

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``; ValueError while they are unknown."""
        if self.in_features is None or self.out_features is None:
            raise ValueError("in_features and out_features are not set; use with_shape")
        return self.out_features, self.in_features

    @property
    def group_size(self) -> int:
        """Columns that share one main codebook; ValueError while ``in_features`` is unknown."""
        if self.in_features is None:
            raise ValueError("in_features is not set; use with_shape")
        return (self.in_features - self.outlier_size) // self.group_num

    def with_shape(self, out_features: int, in_features: int, name: str = "") -> LayerSpec:
        """This spec for a layer of the given size; VPTQFormatError if the spec names another."""
        for key, want, have in (
            ("out_features", out_features, self.out_features),
            ("in_features", in_features, self.in_features),
        ):
            if have is not None and have != want:
                raise VPTQFormatError(name, f"the configuration has {key} {have}, the model {want}")
        spec = replace(self, in_features=in_features, out_features=out_features)
        _check_spec(spec, name)
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


def parse_format(name: str) -> tuple[int, int, int]:
    """``v8-k65536-256`` -> (8, 65536, 256); ``v8-k65536`` is ``v8-k65536-0``. VPTQFormatError for anything else."""
    match = re.fullmatch(r"v(\d+)-k(\d+)(?:-(\d+))?", name)
    if match is None:
        raise VPTQFormatError(f"format {name}", "expected for example v8-k65536-0 or v8-k65536-256")
    spec = LayerSpec(None, None, int(match[1]), int(match[2]), int(match[3] or 0))
    _check_spec(spec, f"format {name}")
    return spec.vector_len, spec.num_centroids, spec.num_res_centroids


_SIZE_KEYS = {"in_features", "out_features", "vector_lens", "num_centroids", "num_res_centroids"}
_COLUMN_KEYS = {"group_num", "group_size", "outlier_size", "enable_norm", "norm_dim", "enable_perm"}
_STORAGE_KEYS = {"is_indice_packed", "indices_as_float", "vector_quant_dim"}
_IGNORED_KEYS = {"bias", "enable_proxy_error"}
_KNOWN_KEYS = _SIZE_KEYS | _COLUMN_KEYS | _STORAGE_KEYS | _IGNORED_KEYS


def _refuse_unknown_keys(section: Mapping[str, Any], known: set[str], name: str) -> None:
    """An unknown key that is off says nothing; one that asks for something might change the weights."""
    for key, value in section.items():
        if key not in known and value not in (None, False, 0, -1, "", [], {}):
            raise VPTQFormatError(name, f"unknown key {key!r} = {value!r}, expected one of {', '.join(sorted(known))}")


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

    def size(key: str) -> int | None:
        value = optional(key)
        return None if value == -1 else value  # transformers' unknown

    def flag(key: str, default: bool) -> bool:
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            raise VPTQFormatError(name, f"{key} is {value!r}, expected true or false")
        return default if value is None else value

    _refuse_unknown_keys(config, _KNOWN_KEYS, name)
    if config.get("vector_quant_dim") not in (None, "out"):
        raise VPTQFormatError(name, f"vector_quant_dim {config['vector_quant_dim']!r}; only 'out' exists in the format")

    (v0, v), (k0, k), (r0, r) = pair("vector_lens"), pair("num_centroids"), pair("num_res_centroids")
    if r0 > 0:
        raise VPTQFormatError(name, f"num_res_centroids has {r0} for outliers, expected -1: they have no residual book")
    outliers = max(optional("outlier_size") or 0, 0)
    spec = cls(
        in_features=size("in_features"),
        out_features=size("out_features"),
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
        f"vector_lens gives length {spec.vector_len}, expected {MIN_VECTOR} to {MAX_VECTOR}",
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
            f"vector_lens gives outlier length {spec.outlier_vector_len}, expected {MIN_VECTOR} to {MAX_VECTOR}",
        )
        require(
            1 <= spec.num_outlier_centroids <= MAX_CENTROIDS,
            f"num_centroids gives {spec.num_outlier_centroids} for outliers, expected 1 to {MAX_CENTROIDS}",
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
        # An entry names a module, one above it, or any component of its name ("lm_head", "o_proj").
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
    for holder in (hf_config, hf_config.get("text_config")):
        if not isinstance(holder, Mapping):
            continue
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
    # One layer that looks like VPTQ's is enough: the others' faults are then reported by name.
    return all(isinstance(c, Mapping) for c in layers) and any("num_centroids" in c for c in layers)


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
    known = {"config_for_layers", "shared_layer_config", "modules_to_not_convert"}
    _refuse_unknown_keys(section, known, "config.json")
    excluded = section.get("modules_to_not_convert") or []
    if not isinstance(excluded, (list, tuple)) or not all(isinstance(module, str) for module in excluded):
        raise VPTQFormatError("config.json", f"modules_to_not_convert is {excluded!r}, expected a list of names")
    layers = specs("config_for_layers", section.get("config_for_layers") or {})
    shared = specs("shared_layer_config", section.get("shared_layer_config") or {})
    if not layers and not shared:
        raise VPTQFormatError("config.json", "config_for_layers and shared_layer_config are both empty")
    return LayerSpecs(layers, shared, tuple(excluded))
