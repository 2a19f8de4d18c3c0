"""Specs, shapes and values of the format, against loops over single elements and sums done by hand."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import BOOK_DTYPES, EVERYTHING, INDEX_DTYPES, few, random_tensors, specs
from vllm_vptq.format import (
    LayerSpec,
    VPTQFormatError,
    as_index,
    column_blocks,
    dequantize,
    effective_bits,
    read_layer_specs,
    tensor_shapes,
    validate,
)

SEEDS = st.integers(0, 2**32)


class Oracle:
    """The closed form of the format, one element at a time."""

    def __init__(self, tensors: dict[str, Tensor], spec: LayerSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.floats = {
            k: t.to(dtype).numpy() for k, t in tensors.items() if k.startswith("weight_") or "centroids" in k
        }
        self.integers = {k: self._unsigned(t) for k, t in tensors.items() if k.endswith("indices") or k == "perm"}
        self.codes = functools.cache(self._codes)

    @staticmethod
    def _unsigned(tensor: Tensor) -> np.ndarray:
        if tensor.dtype.itemsize == 2:
            return tensor.view(torch.int16).numpy().view(np.uint16)
        return tensor.numpy()

    def _codes(self, group: int, row: int, column: int) -> tuple[int, int]:
        """Main and residual index of one vector."""
        spec, indices = self.spec, self.integers["indices"][group, row]
        if not spec.is_indice_packed:
            residual = int(self.integers["res_indices"][group, row, column]) if spec.num_res_centroids else 0
            return int(indices[column]), residual
        main_bits = len(f"{spec.num_centroids:b}") - 1
        res_bits = len(f"{spec.num_res_centroids:b}") - 1 if spec.num_res_centroids else 0
        start = column * (main_bits + res_bits)
        bits = [int(indices[t // 32]) >> t % 32 & 1 for t in range(start, start + main_bits + res_bits)]
        main = sum(bit << i for i, bit in enumerate(bits[:main_bits]))
        return main, sum(bit << i for i, bit in enumerate(bits[main_bits:]))

    def stored(self, row: int, column: int):
        """Element of the weight as stored: columns not yet permuted back, no norm."""
        spec = self.spec
        if column < spec.outlier_size:
            vector, entry = divmod(row, spec.outlier_vector_len)
            code = int(self.integers["outlier_indices"][0, vector, column])
            return self.floats["outlier_centroids.weight"][0, code * spec.outlier_vector_len + entry]
        size = (spec.in_features - spec.outlier_size) // spec.group_num
        group, place = divmod(column - spec.outlier_size, size)
        vector, entry = divmod(row, spec.vector_len)
        main, residual = self.codes(group, vector, place)
        value = self.floats["centroids.weight"][group, main * spec.vector_len + entry]
        if spec.num_res_centroids:
            value = value + self.floats["res_centroids.weight"][group, residual * spec.vector_len + entry]
        return value

    def channel(self, column: int) -> int:
        return int(self.integers["perm"][column]) if self.spec.enable_perm else column

    def element(self, row: int, column: int):
        """Element of the weight at the original channel of a stored column."""
        value = self.stored(row, column)
        if self.spec.enable_norm:
            at = row if self.spec.norm_dim == 1 else self.channel(column)
            value = value * self.floats["weight_scale"][at] + self.floats["weight_bias"][at]
        return value

    def weight(self) -> Tensor:
        spec = self.spec
        weight = np.empty((spec.out_features, spec.in_features), self.floats["centroids.weight"].dtype)
        for column in range(spec.in_features):
            for row in range(spec.out_features):
                weight[row, self.channel(column)] = self.element(row, column)
        return torch.from_numpy(weight)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-6 if expected.dtype == torch.float32 else 1e-14
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few(120)
@given(spec=specs(), seed=SEEDS, book=st.sampled_from(BOOK_DTYPES), index=st.sampled_from((None, *INDEX_DTYPES)))
def test_dequantize_is_the_closed_form(dtype, spec, seed, book, index):
    tensors = random_tensors(spec, seed, book, index)
    validate("layer", tensors, spec)
    assert_same(dequantize(tensors, spec, dtype), Oracle(tensors, spec, dtype).weight())


@pytest.mark.parametrize(("k", "r"), [(2, 0), (2, 2), (4, 256), (2, 65536), (65536, 2), (65536, 65536)])
@pytest.mark.parametrize("packed", [True, False])
def test_dequantize_at_every_ratio_of_main_and_residual(k, r, packed):
    spec = LayerSpec(37, 19, vector_len=8, num_centroids=k, num_res_centroids=r, is_indice_packed=packed)
    tensors = random_tensors(spec, seed=k + r)
    assert_same(dequantize(tensors, spec), Oracle(tensors, spec, torch.float32).weight())


@pytest.mark.parametrize("perm", [True, False])
def test_dequantize_of_a_layer_too_large_for_one_piece(perm):
    spec = replace(EVERYTHING, in_features=2050, out_features=3005, num_centroids=4096, vector_len=7)
    spec = replace(spec, is_indice_packed=True, enable_perm=perm)
    tensors = random_tensors(spec, seed=5)
    weight, oracle = dequantize(tensors, spec), Oracle(tensors, spec, torch.float32)
    generator = np.random.default_rng(5)
    rows = [0, 3004, *generator.integers(3005, size=3000).tolist()]
    columns = [0, 2049, *generator.integers(2050, size=3000).tolist()]
    expected = torch.tensor(np.array([oracle.element(*at) for at in zip(rows, columns, strict=True)]))
    assert_same(weight[rows, [oracle.channel(column) for column in columns]], expected)


@few(30)
@given(spec=specs(is_indice_packed=True), seed=SEEDS)
def test_dequantize_ignores_the_padding_of_the_stream(spec, seed):
    tensors = random_tensors(spec, seed)
    used = spec.group_size * spec.total_bits % 32
    dirty = tensors["indices"].clone()
    if used:
        dirty[..., -1] |= -1 << used
    assert torch.equal(dequantize(tensors | {"indices": dirty}, spec), dequantize(tensors, spec))


@few(40)
@given(spec=specs(), seed=SEEDS, cut=st.integers(0, 3))
def test_column_blocks_are_outliers_then_groups(spec, seed, cut):
    tensors = random_tensors(spec, seed)
    oracle = Oracle(tensors, spec, torch.float32)
    blocks = list(column_blocks(tensors, spec))
    assert torch.cat([b.columns for b in blocks]).tolist() == [oracle.channel(p) for p in range(spec.in_features)]

    def check(block, main, residual, book, res_book):
        assert block.vector_rows == len(main)
        assert torch.equal(block.book, book)
        assert (block.res_book is None) == (res_book is None)
        assert res_book is None or torch.equal(block.res_book, res_book)
        for lo, hi in ((0, cut), (cut, cut + 1), (cut, len(main) + 5)):
            index, res_index = block.read(lo, hi)
            assert index.dtype == torch.int64
            assert index.tolist() == main[lo:hi].tolist()
            assert (res_index is None) == (residual is None)
            assert residual is None or res_index.tolist() == residual[lo:hi].tolist()

    if spec.outlier_size:
        book = tensors["outlier_centroids.weight"].reshape(-1, spec.outlier_vector_len)
        check(blocks.pop(0), oracle.integers["outlier_indices"][0], None, book, None)
    assert len(blocks) == spec.group_num
    rows, has_residual = range(-(-spec.out_features // spec.vector_len)), spec.num_res_centroids > 0
    for g, block in enumerate(blocks):
        codes = np.array([[oracle.codes(g, row, c) for c in range(spec.group_size)] for row in rows])
        book = tensors["centroids.weight"][g].reshape(-1, spec.vector_len)
        res_book = tensors["res_centroids.weight"][g].reshape(-1, spec.vector_len) if has_residual else None
        check(block, codes[..., 0], codes[..., 1] if has_residual else None, book, res_book)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.float16, torch.bfloat16])
def test_as_index_reads_every_16_bit_pattern(dtype):
    patterns = torch.tensor(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(dtype)
    assert as_index(patterns).tolist() == list(range(1 << 16))


# ---------------------------------------------------------------------------------------------------------------
# Sizes


@few(60)
@given(spec=specs(), seed=SEEDS, bias=st.booleans())
def test_tensor_shapes_are_those_of_the_description(spec, seed, bias):
    tensors = random_tensors(spec, seed, bias=bias)
    validate("layer", tensors, spec)
    assert tensor_shapes(spec) == {key: tuple(t.shape) for key, t in tensors.items() if key != "bias"}


def test_tensor_shapes_of_a_layer_with_everything():
    shapes = {
        "indices": (2, 3, 10),
        "res_indices": (2, 3, 10),
        "centroids.weight": (2, 32),
        "res_centroids.weight": (2, 16),
        "outlier_indices": (1, 4, 2),
        "outlier_centroids.weight": (1, 15),
        "perm": (22,),
        "weight_scale": (10,),
        "weight_bias": (10,),
    }
    assert tensor_shapes(EVERYTHING) == shapes
    del shapes["res_indices"]
    packed = replace(EVERYTHING, is_indice_packed=True, norm_dim=0)
    assert tensor_shapes(packed) == shapes | {"indices": (2, 3, 2), "weight_scale": (22,), "weight_bias": (22,)}


K_PROJ = LayerSpec(4096, 1024, vector_len=8, num_centroids=65536, num_res_centroids=256)
SQUARE = LayerSpec(4096, 4096, vector_len=8, num_centroids=4096)


@pytest.mark.parametrize(
    ("spec", "book_bits", "expected"),
    [
        pytest.param(K_PROJ, 16, 3 + 2 + 1 / 128, id="3 bits of index and 2 of books"),
        pytest.param(K_PROJ, 8, 3 + 1 + 1 / 256, id="books of 8 bits"),
        pytest.param(SQUARE, 16, 1.5 + 1 / 32, id="no residual"),
        pytest.param(replace(SQUARE, enable_norm=True, enable_perm=True), 16, 1.53125 + 48 / 4096, id="norm, perm"),
        pytest.param(LayerSpec(7, 4, vector_len=2, num_centroids=32), 16, (2 * 64 + 32 * 2 * 16) / 28, id="padding"),
        pytest.param(
            EVERYTHING,
            32,
            (960 + 960 + 2048 + 1024 + 128 + 480 + 320 + 320 + 352) / 220,
            id="everything, unpacked, float32 books",
        ),
    ],
)
def test_effective_bits(spec, book_bits, expected):
    assert effective_bits(spec, book_bits) == pytest.approx(expected, rel=1e-12)


def test_a_spec_without_sizes():
    spec = replace(EVERYTHING, in_features=None, out_features=None)
    for use in (lambda: spec.shape, lambda: spec.group_size, lambda: tensor_shapes(spec)):
        with pytest.raises(ValueError, match="with_shape"):
            use()
    assert spec.with_shape(10, 22) == EVERYTHING
    assert EVERYTHING.with_shape(10, 22) == EVERYTHING
    assert spec.with_shape(7, 42).group_size == 20


# ---------------------------------------------------------------------------------------------------------------
# Configurations

UP = {
    "in_features": 64,
    "out_features": 48,
    "vector_lens": [-1, 8],
    "num_centroids": [-1, 256],
    "num_res_centroids": [-1, 16],
    "group_num": 2,
    "group_size": 32,
    "outlier_size": 0,
    "enable_norm": True,
    "enable_perm": False,
    "is_indice_packed": True,
    "indices_as_float": None,
    "bias": "Parameter containing: tensor([...])",
    "vector_quant_dim": "out",
    "enable_proxy_error": True,
}
UP_SPEC = LayerSpec(64, 48, vector_len=8, num_centroids=256, num_res_centroids=16, group_num=2, enable_norm=True)
Q = {"vector_lens": (4, 6), "num_centroids": (100, 4), "num_res_centroids": (-1, -1), "outlier_size": 3, "norm_dim": 1}
Q_SPEC = LayerSpec(None, None, 6, 4, outlier_size=3, outlier_vector_len=4, num_outlier_centroids=100, norm_dim=1)
LAYERS = {"model.layers.0.mlp.up_proj": UP, "model.layers.1.self_attn.q_proj": Q}

GENERATIONS = {
    "F0": {"quant_config": LAYERS},
    "F0b": {"quantization_config": LAYERS},
    "F1": {"quantization_config": {"quant_method": "vptq", "config_for_layers": LAYERS}},
    "F2": {"quantization_config": {"quant_method": "vptq", "config_for_layers": LAYERS, "shared_layer_config": {}}},
}


@pytest.mark.parametrize("nest", ["top", "text_config", "section"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_reads_alike(generation, nest):
    config = GENERATIONS[generation]
    if nest == "text_config":
        config = {"model_type": "some_vlm", "quantization_config": None, "text_config": config}
    elif nest == "section":
        (config,) = config.values()
    specs = read_layer_specs(config)
    assert dict(specs) == {"model.layers.0.mlp.up_proj": UP_SPEC, "model.layers.1.self_attn.q_proj": Q_SPEC}
    assert len(specs) == 2
    for absent in ("lm_head", "up_proj", "layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"):
        assert absent not in specs


def section(**keys):
    return read_layer_specs({"quantization_config": {"quant_method": "vptq", **keys}})


def test_shared_layers_are_found_by_leaf_after_full_names():
    specs = section(config_for_layers={"model.layers.0.q_proj": UP}, shared_layer_config={"q_proj": Q, "fc1": UP})
    assert specs["model.layers.0.q_proj"] == UP_SPEC
    assert specs["model.layers.1.self_attn.q_proj"] == Q_SPEC
    assert specs["q_proj"] == Q_SPEC
    assert specs["decoder.fc1"] == UP_SPEC
    for absent in ("model.q_proj.inner", "model.kq_proj", "model.layers.1.k_proj"):
        assert absent not in specs
    assert list(specs) == ["model.layers.0.q_proj"]


@pytest.mark.parametrize("entry", ["lm_head", "vision", "vision.blocks.1.q_proj", "q_proj", "blocks.1"])
def test_modules_not_to_convert(entry):
    names = ["lm_head", "vision.blocks.1.q_proj", "vision.blocks.1.k_proj", "vision.blocks.11.q_proj", "tail.k_proj"]
    excluded = {
        "lm_head": {0},
        "vision": {1, 2, 3},
        "vision.blocks.1.q_proj": {1},
        "q_proj": {1, 3},
        "blocks.1": {1, 2},
    }
    shared = {"lm_head": UP, "q_proj": UP, "k_proj": UP}
    for tables in ({"config_for_layers": dict.fromkeys(names, UP)}, {"shared_layer_config": shared}):
        specs = section(**tables, modules_to_not_convert=[entry])
        assert [name in specs for name in names] == [i not in excluded[entry] for i in range(5)]
        assert all(name in specs for name in specs)
        assert len(specs) == len(list(specs))


def test_what_transformers_writes():
    """``VptqConfig(...).to_dict()``: it keeps its own ``enable_proxy_error`` beside the tables."""
    specs = section(
        enable_proxy_error=False, config_for_layers=LAYERS, shared_layer_config={}, modules_to_not_convert=None
    )
    assert len(specs) == 2


def test_keys_that_are_switched_off_or_only_inform_are_ignored():
    off = {"a": None, "b": False, "c": 0, "d": -1, "e": "", "f": [], "g": {}}
    assert LayerSpec.from_config(UP | off) == UP_SPEC


@few(80)
@given(spec=specs(), sized=st.booleans())
def test_configurations_round_trip(spec, sized):
    if not sized:
        spec = replace(spec, in_features=None, out_features=None)
    config = json.loads(json.dumps(spec.to_config()))
    assert LayerSpec.from_config(config) == spec
    assert ("norm_dim" in config) == (spec.norm_dim == 1)
    with_full_names = {"quantization_config": {"quant_method": "vptq", "config_for_layers": {"m.layer": config}}}
    assert dict(read_layer_specs(with_full_names)) == {"m.layer": spec}


def test_to_config_is_the_reference_s():
    config = UP_SPEC.to_config()
    same = {key: UP[key] for key in UP.keys() & config.keys()}
    assert config == same | {"indices_as_float": False}
    assert UP.keys() - config.keys() == {"bias", "enable_proxy_error"}


def test_specs_are_immutable_values():
    assert len({EVERYTHING, replace(EVERYTHING), K_PROJ}) == 2
    with pytest.raises(AttributeError):
        EVERYTHING.vector_len = 8


def test_with_shape_refuses_another_shape():
    with pytest.raises(VPTQFormatError, match=r"^m\.layer: .*out_features 10.*12$"):
        EVERYTHING.with_shape(12, 22, "m.layer")
    with pytest.raises(VPTQFormatError, match=r"^m\.layer: .*in_features 22.*24$"):
        EVERYTHING.with_shape(10, 24, "m.layer")
