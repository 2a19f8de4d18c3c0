"""Random layer specs and random tensors for them, written from the format's description, not from its reader.

``specs()`` is a hypothesis strategy over everything the format allows; ``random_tensors`` fills a spec with values.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_vptq.format import LayerSpec, VPTQFormatError

BOOK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int16, torch.uint16, torch.float16, torch.int32, torch.int64)

EVERYTHING = LayerSpec(
    in_features=22,
    out_features=10,
    vector_len=4,
    num_centroids=8,
    num_res_centroids=4,
    group_num=2,
    outlier_size=2,
    outlier_vector_len=3,
    num_outlier_centroids=5,
    enable_norm=True,
    norm_dim=1,
    enable_perm=True,
    is_indice_packed=False,
)
"""Unpacked, with every option on and no size that divides another; see it packed with ``replace``."""

_SPEC_FIELDS = set(LayerSpec.__dataclass_fields__) - {"in_features"}


def few(max_examples: int) -> settings:
    """Hypothesis settings of this repository: the same examples on every run, no time limit for one of them."""
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


@st.composite
def specs(
    draw: st.DrawFn, *, max_out: int = 40, max_group_size: int = 40, max_bits: int = 16, **fixed: Any
) -> LayerSpec:
    """Valid specs of small layers. ``fixed`` pins fields of LayerSpec, ``in_features`` excepted: it follows from
    the outliers, the groups and a group size up to ``max_group_size``.

    Most books are small; about one in six has up to ``1 << max_bits`` centroids. Main and residual width are
    independent, so either may be the wider, and a merged index has up to ``2 * max_bits`` bits.
    """
    if unknown := fixed.keys() - _SPEC_FIELDS:
        raise TypeError(f"specs() cannot pin {', '.join(sorted(unknown))}")

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    def book_bits() -> st.SearchStrategy[int]:
        wide = draw(st.integers(0, 5)) == 5
        return st.integers(min(8, max_bits), max_bits) if wide else st.integers(1, min(7, max_bits))

    centroids = pick("num_centroids", book_bits().map(lambda bits: 1 << bits))
    residuals = pick("num_res_centroids", st.one_of(st.just(0), book_bits().map(lambda bits: 1 << bits)))
    groups = pick("group_num", st.integers(1, 2 if max(centroids, residuals) > 1024 else 4))
    outliers = pick("outlier_size", st.one_of(st.just(0), st.integers(1, 8)))
    many_outlier_centroids = draw(st.integers(0, 7)) == 7
    outlier_centroids = st.integers(32769, 65536) if many_outlier_centroids else st.integers(1, 300)
    norm = pick("enable_norm", st.booleans())
    return LayerSpec(
        in_features=outliers + groups * draw(st.integers(1, max_group_size)),
        out_features=pick("out_features", st.integers(1, max_out)),
        vector_len=pick("vector_len", st.integers(2, 16)),
        num_centroids=centroids,
        num_res_centroids=residuals,
        group_num=groups,
        outlier_size=outliers,
        outlier_vector_len=pick("outlier_vector_len", st.integers(2, 16)) if outliers else 0,
        num_outlier_centroids=pick("num_outlier_centroids", outlier_centroids) if outliers else 0,
        enable_norm=norm,
        norm_dim=pick("norm_dim", st.integers(0, 1)) if norm else 0,
        enable_perm=pick("enable_perm", st.booleans()),
        is_indice_packed=pick("is_indice_packed", st.booleans()),
        indices_as_float=pick("indices_as_float", st.booleans()),
    )


def random_tensors(
    spec: LayerSpec,
    seed: int,
    dtype: torch.dtype = torch.float16,
    index_dtype: torch.dtype | None = None,
    bias: bool = False,
) -> dict[str, Tensor]:
    """Random valid tensors of one module, by their name below it.

    ``dtype`` is that of books and norm. ``index_dtype`` is that of indices outside the packed stream: None for the
    one the spec says (int16, or float16 with ``indices_as_float``), both of which hold the bits of a uint16. ``perm``
    follows: int16 in packed layers and int64 in others for None, else ``index_dtype``, or int16 where that is a float.
    """
    assert spec.in_features is not None and spec.out_features is not None
    gen = torch.Generator().manual_seed(seed)
    perm_dtype = index_dtype or (torch.int16 if spec.is_indice_packed else torch.int64)
    if perm_dtype.is_floating_point:
        perm_dtype = torch.int16
    index_dtype = index_dtype or (torch.float16 if spec.indices_as_float else torch.int16)
    groups, v = spec.group_num, spec.vector_len
    size = (spec.in_features - spec.outlier_size) // groups
    rows = -(-spec.out_features // v)

    def book(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    def index(stop: int, *shape: int) -> Tensor:
        values = torch.randint(stop, shape, generator=gen)
        values.view(-1)[int(torch.randint(values.numel(), (), generator=gen))] = stop - 1
        return disguise(values, index_dtype)

    tensors = {"centroids.weight": book(groups, spec.num_centroids * v)}
    if spec.num_res_centroids:
        tensors["res_centroids.weight"] = book(groups, spec.num_res_centroids * v)
    if spec.is_indice_packed:
        tensors["indices"] = _random_stream(gen, (groups, rows), size * spec.total_bits)
    else:
        tensors["indices"] = index(spec.num_centroids, groups, rows, size)
        if spec.num_res_centroids:
            tensors["res_indices"] = index(spec.num_res_centroids, groups, rows, size)
    if spec.outlier_size:
        tensors["outlier_centroids.weight"] = book(1, spec.num_outlier_centroids * spec.outlier_vector_len)
        outlier_rows = -(-spec.out_features // spec.outlier_vector_len)
        tensors["outlier_indices"] = index(spec.num_outlier_centroids, 1, outlier_rows, spec.outlier_size)
    if spec.enable_perm:
        tensors["perm"] = disguise(torch.randperm(spec.in_features, generator=gen), perm_dtype)
    if spec.enable_norm:
        length = spec.out_features if spec.norm_dim else spec.in_features
        tensors["weight_scale"] = (0.5 + torch.rand(length, generator=gen)).to(dtype)
        tensors["weight_bias"] = book(length)
    if bias:
        tensors["bias"] = book(spec.out_features)
    return tensors


def disguise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Indices below 65536 as ``dtype``; a dtype of 16 bits holds the bits of their uint16."""
    if dtype.itemsize != 2:
        return values.to(dtype)
    signed = torch.where(values >= 1 << 15, values - (1 << 16), values)
    return signed.to(torch.int16).view(dtype)


def _random_stream(gen: torch.Generator, lead: tuple[int, ...], bits: int) -> Tensor:
    """Any bits are valid merged indices (both books are powers of two); only the padding has to be zero."""
    words = torch.randint(1 << 32, (*lead, math.ceil(bits / 32)), generator=gen)
    words[..., -1] &= (1 << ((bits - 1) % 32 + 1)) - 1
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def refusal(*parts: object, name: str):
    """Expects a VPTQFormatError of one line that begins with the module and holds ``parts`` in this order."""
    pattern = ".*".join(re.escape(str(part)) for part in parts)
    return pytest.raises(VPTQFormatError, match=rf"\A{re.escape(name)}: .*{pattern}.*\Z")


def is_one_line_about(error: VPTQFormatError, name: str) -> bool:
    return str(error).startswith(f"{name}: ") and error.module == name and len(str(error).splitlines()) == 1


PUBLIC_FORMATS = (
    "v8-k65536-65536", "v8-k65536-4096", "v8-k65536-256", "v8-k65536-4", "v8-k65536-0", "v8-k32768-0", "v8-k16384-0",
    "v8-k4096-0", "v8-k1024-512", "v8-k512-512", "v8-k256-256", "v12-k65536-4096", "v16-k65536-65536",
    "v16-k65536-32768", "v16-k65536-16384", "v16-k65536-4096", "v16-k65536-1024", "v16-k65536-256", "v16-k65536-128",
    "v16-k65536-64", "v16-k32768-32768",
)  # fmt: skip
"""Of the checkpoints that the reference's README lists."""


def spec_extras(num_outlier_centroids: int) -> dict[str, dict[str, object]]:
    """What a LayerSpec may have besides its books, by name; the outliers' book is of the given size."""
    outliers = dict(outlier_size=12, outlier_vector_len=4, num_outlier_centroids=num_outlier_centroids)
    return {
        "plain": {},
        "column norm": dict(enable_norm=True, enable_perm=True),
        "row norm": dict(enable_norm=True, norm_dim=1),
        "groups": dict(group_num=3, enable_perm=True),
        "outliers": dict(outliers, enable_norm=True),
    }
