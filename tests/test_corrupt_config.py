"""Configurations that are not the format's: one line names the module, what was found and what expected."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import EVERYTHING, few, is_one_line_about, refusal
from vllm_vptq.format import LayerSpec, VPTQFormatError, effective_bits, read_layer_specs, tensor_shapes

NAME = "model.layers.3.mlp.down_proj"
PACKED = replace(EVERYTHING, is_indice_packed=True)

# ---------------------------------------------------------------------------------------------------------------
# One layer's configuration

CONFIG = EVERYTHING.to_config()
SIZE = "expected a power of two from 2 to 65536"
BAD_VALUES = [
    ("vector_lens", [3, 1], ("vector", 1, "expected 2 to 16")),
    ("vector_lens", [3, 17], ("vector", 17, "expected 2 to 16")),
    ("vector_lens", [3, -1], ("vector", -1, "expected 2 to 16")),
    ("vector_lens", [1, 4], ("vector_lens", "outlier", 1, "expected 2 to 16")),
    ("vector_lens", [-1, 4], ("vector_lens", "outlier", -1, "expected 2 to 16")),
    ("vector_lens", [17, 4], ("vector_lens", "outlier", 17, "expected 2 to 16")),
    ("num_centroids", [5, 12], ("num_centroids", 12, SIZE)),
    ("num_centroids", [5, 131072], ("num_centroids", 131072, SIZE)),
    ("num_centroids", [5, 1], ("num_centroids", 1, SIZE)),
    ("num_centroids", [5, -1], ("num_centroids", -1, SIZE)),
    ("num_centroids", [-1, 8], (-1, "outliers", "expected 1 to 65536")),
    ("num_centroids", [0, 8], (0, "outliers", "expected 1 to 65536")),
    ("num_centroids", [65537, 8], (65537, "outliers", "expected 1 to 65536")),
    ("num_res_centroids", [-1, 12], ("num_res_centroids", 12, SIZE)),
    ("num_res_centroids", [-1, 131072], ("num_res_centroids", 131072, SIZE)),
    ("num_res_centroids", [-1, 1], ("num_res_centroids", 1, SIZE)),
    ("num_res_centroids", [256, 4], ("num_res_centroids", 256, "expected")),
    ("group_num", 0, ("group_num", 0, "expected at least 1")),
    ("group_num", -1, ("group_num", -1, "expected at least 1")),
    ("group_num", 3, ("22 columns", "2 outliers", "3 groups")),
    ("group_num", 40, ("22 columns", "2 outliers", "40 groups")),
    ("outlier_size", 22, ("22 columns", "22 outliers", "2 groups")),
    ("outlier_size", 3, ("22 columns", "3 outliers", "2 groups")),
    ("group_size", 7, ("group_size", 7, "expected 10")),
    ("norm_dim", 2, ("norm_dim", 2, "expected 0", "1")),
    ("norm_dim", -1, ("norm_dim", -1, "expected 0", "1")),
    ("in_features", 0, ("in_features", 0, "expected a positive")),
    ("out_features", -10, ("out_features", -10, "expected a positive")),
    ("vector_quant_dim", "in", ("vector_quant_dim", "'in'", "'out'")),
    ("vector_quant_dim", "OUT", ("vector_quant_dim", "'OUT'", "'out'")),
    ("scale_bits", 8, ("unknown key 'scale_bits'", 8)),
    ("codebook", {"shared": True}, ("unknown key 'codebook'", "{'shared': True}")),
    ("vector_len", "8", ("unknown key 'vector_len'", "'8'")),
]


@pytest.mark.parametrize(("key", "value", "parts"), BAD_VALUES)
def test_value_the_format_does_not_have(key, value, parts):
    with refusal(*parts, name=NAME):
        LayerSpec.from_config(CONFIG | {key: value}, NAME)


INTEGERS = ["in_features", "out_features", "group_num", "group_size", "outlier_size", "norm_dim"]
FLAGS = ["enable_norm", "enable_perm", "is_indice_packed", "indices_as_float"]
PAIRS = ["vector_lens", "num_centroids", "num_res_centroids"]
WRONG_TYPES = [
    *((key, value, "integer") for key in INTEGERS for value in ("2", True, False, 2.0, [2], {}, "")),
    *((key, value, "true or false") for key in FLAGS for value in (1, 0, "true", 1.0, [], "")),
    *((key, value, "[outlier, main]") for key in PAIRS for value in (None, 4, "44", [4], [4, 4, 4], {"0": 4}, True)),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_TYPES)
def test_value_of_another_type(key, value, expected):
    with refusal(key, repr(value), "expected", expected, name=NAME):
        LayerSpec.from_config(CONFIG | {key: value}, NAME)


@pytest.mark.parametrize("entry", ["4", True, 4.0, None, [4]])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("key", PAIRS)
def test_entry_of_another_type(key, place, entry):
    pair = [4, 4]
    pair[place] = entry
    with refusal(key, repr(entry), "expected an integer", name=NAME):
        LayerSpec.from_config(CONFIG | {key: pair}, NAME)


@pytest.mark.parametrize("key", PAIRS)
def test_missing_key(key):
    with refusal(key, "expected", name=NAME):
        LayerSpec.from_config({k: v for k, v in CONFIG.items() if k != key}, NAME)


def test_a_merged_index_has_at_most_32_bits():
    largest = LayerSpec.from_config(CONFIG | {"num_centroids": [5, 65536], "num_res_centroids": [-1, 65536]}, NAME)
    assert largest.total_bits == 32
    for key, pair in (("num_centroids", [5, 131072]), ("num_res_centroids", [-1, 131072])):
        with refusal(key, 131072, name=NAME):
            LayerSpec.from_config(largest.to_config() | {key: pair}, NAME)


@pytest.mark.parametrize("key", ["in_features", "out_features"])
@pytest.mark.parametrize("group_size", [10, -1, None])
def test_one_size_alone_is_refused_or_completed(key, group_size):
    config = {k: v for k, v in CONFIG.items() if k != key} | {"group_size": group_size}
    try:
        spec = LayerSpec.from_config(config, NAME)
    except VPTQFormatError as error:
        assert is_one_line_about(error, NAME)
    else:
        assert spec.with_shape(10, 22) == EVERYTHING


@pytest.mark.parametrize(("out", "columns"), [(10, 21), (10, 2), (10, 0), (0, 22), (-4, 22)])
def test_shape_a_spec_cannot_have(out, columns):
    unsized = replace(EVERYTHING, in_features=None, out_features=None)
    with refusal(columns if columns != 22 else out, name=NAME):
        unsized.with_shape(out, columns, NAME)


scalars = st.none() | st.booleans() | st.integers() | st.integers(-2, 70000) | st.floats() | st.text(max_size=4)
any_json = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=4
)
number = st.sampled_from([-1, 0, 1, 2, 4, 8, 20, 22, 256, 65536, 131072, 2**31, 2**63, 2**64])
near_json = st.one_of(number, st.lists(number, min_size=2, max_size=2), st.booleans(), any_json)
DROP = object()


def mutate(table: dict, key: str, value: object) -> dict:
    return {k: v for k, v in table.items() if k != key} if value is DROP else table | {key: value}


@few(500)
@given(
    config=st.sampled_from([CONFIG, PACKED.to_config(), replace(PACKED, in_features=None).to_config()]),
    changes=st.lists(
        st.tuples(st.sampled_from([*CONFIG, "norm_dim", "bias", "colour"]), near_json | st.just(DROP)), min_size=1
    ),
)
def test_a_mutated_layer_is_refused_or_usable(config, changes):
    for change in changes:
        config = mutate(config, *change)
    try:
        spec = LayerSpec.from_config(config, NAME)
        spec = spec.with_shape(spec.out_features or 10, spec.in_features or 22, NAME)
    except VPTQFormatError as error:
        assert is_one_line_about(error, NAME)
        return
    shapes = tensor_shapes(spec)
    assert {"indices", "centroids.weight"} <= shapes.keys()
    assert all(isinstance(size, int) and size > 0 for shape in shapes.values() for size in shape)
    assert effective_bits(spec) > 0
    assert LayerSpec.from_config(json.loads(json.dumps(spec.to_config())), NAME) == spec


# ---------------------------------------------------------------------------------------------------------------
# The whole configuration

LAYER = PACKED.to_config()
SECTION = {
    "quant_method": "vptq",
    "config_for_layers": {NAME: LAYER},
    "shared_layer_config": {"fc1": LAYER},
    "modules_to_not_convert": ["lm_head"],
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None, "quant_config": {}, "text_config": None},
        {"quantization_config": {"quant_method": "awq", "config_for_layers": {NAME: LAYER}}},
        {"quantization_config": {"bits": 4, "group_size": 128}},
        {"quantization_config": "vptq", "text_config": {"quant_config": [LAYER]}},
    ],
)
def test_no_vptq_configuration(config):
    with refusal("no VPTQ configuration", "quantization_config", "quant_config", name="config.json"):
        read_layer_specs(config)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"config_for_layers": {}, "shared_layer_config": {}}, ("config_for_layers", "shared_layer_config", "empty")),
        ({"config_for_layers": [LAYER]}, ("config_for_layers", "list", "expected a table")),
        ({"shared_layer_config": "fc1"}, ("shared_layer_config", "str", "expected a table")),
        ({"version": 3}, ("unknown key 'version'",)),
        ({"modules_to_not_convert": "lm_head"}, ("modules_to_not_convert", "lm_head", "expected")),
        ({"modules_to_not_convert": 3}, ("modules_to_not_convert", "3", "expected")),
        ({"modules_to_not_convert": ["lm_head", 3]}, ("modules_to_not_convert", "3", "expected")),
    ],
)
def test_section_that_says_something_else(change, parts):
    with refusal(*parts, name="config.json"):
        read_layer_specs({"quantization_config": SECTION | change})


@pytest.mark.parametrize("table", ["config_for_layers", "shared_layer_config"])
def test_errors_in_a_table_name_the_module(table):
    with refusal("list", "expected a table", name="model.fc2"):
        read_layer_specs({"quantization_config": SECTION | {table: {"fc1": LAYER, "model.fc2": [8]}}})
    with refusal("num_centroids", 12, SIZE, name="model.fc2"):
        broken = LAYER | {"num_centroids": [5, 12]}
        read_layer_specs({"quantization_config": SECTION | {table: {"fc1": LAYER, "model.fc2": broken}}})


@pytest.mark.parametrize("key", ["quant_config", "quantization_config"])
def test_errors_in_a_configuration_without_quant_method_name_the_module(key):
    broken = {k: v for k, v in LAYER.items() if k != "num_centroids"}
    with refusal("num_centroids", "expected", name="model.fc2"):
        read_layer_specs({key: {"model.fc1": LAYER, "model.fc2": broken}})


@pytest.mark.parametrize("text_config", ["abc", 3, [1], True])
def test_text_config_that_is_no_table(text_config):
    with refusal("config", name="config.json"):
        read_layer_specs({"text_config": text_config})
    assert NAME in read_layer_specs({"quantization_config": SECTION, "text_config": text_config})


PATHS = [
    ("text_config",),
    ("quantization_config",),
    *(("quantization_config", key) for key in SECTION),
    ("quantization_config", "config_for_layers", NAME),
    ("quantization_config", "shared_layer_config", "fc1"),
    ("quantization_config", "shared_layer_config", "fc1", "num_centroids"),
]


@few(300)
@given(path=st.sampled_from(PATHS), value=near_json | st.just(DROP), nested=st.booleans())
def test_a_mutated_configuration_is_refused_or_usable(path, value, nested):
    def changed(table, keys):
        head, *rest = keys
        return mutate(table, head, changed(table[head], rest) if rest else value)

    config = changed({"quantization_config": SECTION, "text_config": {}}, path)
    try:
        found = read_layer_specs({"text_config": config} if nested else config)
    except VPTQFormatError as error:
        assert len(str(error).splitlines()) == 1
        return
    for spec in [*found.values(), *(found[name] for name in (NAME, "model.fc1") if name in found)]:
        assert tensor_shapes(spec)
