"""Tensors that are not what their layer says: one line names the module, what was found and what expected."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import BOOK_DTYPES, EVERYTHING, disguise, few, is_one_line_about, random_tensors, refusal, specs
from vllm_vptq.format import LayerSpec, VPTQFormatError, dequantize, tensor_shapes, validate

NAME = "model.layers.3.mlp.down_proj"
PACKED = replace(EVERYTHING, is_indice_packed=True)
BOOKS = ["centroids.weight", "res_centroids.weight", "outlier_centroids.weight"]
NORM = ["weight_scale", "weight_bias"]
EVERY_TENSOR = [(spec, key) for spec in (EVERYTHING, PACKED) for key in tensor_shapes(spec)]


def tensor_id(value: object) -> str:
    return ("packed" if value.is_indice_packed else "unpacked") if isinstance(value, LayerSpec) else str(value)


@pytest.mark.parametrize(("spec", "key"), EVERY_TENSOR, ids=tensor_id)
def test_missing_tensor(spec, key):
    tensors = random_tensors(spec, seed=0)
    shape = list(tensors.pop(key).shape)
    with refusal(key, "missing", "expected", shape, name=NAME):
        validate(NAME, tensors, spec)


@pytest.mark.parametrize("key", ["weight", "qweight", "centroids", "indices.weight", "res_indices"])
def test_unknown_tensor(key):
    tensors = random_tensors(PACKED, seed=1)
    tensors[key] = tensors["indices"]
    with refusal("unknown tensor", key, "expects", "centroids.weight", name=NAME):
        validate(NAME, tensors, PACKED)


@pytest.mark.parametrize("option", ["num_res_centroids", "outlier_size", "enable_perm", "enable_norm"])
def test_tensors_of_an_option_that_is_off(option):
    spec = replace(EVERYTHING, in_features=20, outlier_size=0, outlier_vector_len=0, num_outlier_centroids=0)
    with_option = random_tensors(EVERYTHING if option == "outlier_size" else spec, seed=2)
    without = replace(spec, **{option: type(getattr(spec, option))(0)})
    extra = with_option.keys() - tensor_shapes(without).keys()
    tensors = random_tensors(without, seed=3) | {key: with_option[key] for key in extra}
    with pytest.raises(VPTQFormatError, match=rf"\A{NAME}: .*unknown tensor ({'|'.join(extra)})"):
        validate(NAME, tensors, without)


@pytest.mark.parametrize(
    "reshape",
    [lambda t: torch.cat([t, t]), lambda t: t[..., :-1], lambda t: t.flatten()[:, None], lambda t: t[None]],
    ids=["doubled", "one less", "column", "one more dimension"],
)
@pytest.mark.parametrize(("spec", "key"), EVERY_TENSOR, ids=tensor_id)
def test_wrong_shape(spec, key, reshape):
    tensors = random_tensors(spec, seed=4)
    expected = list(tensors[key].shape)
    tensors[key] = reshape(tensors[key])
    with refusal(key, list(tensors[key].shape), "expected", expected, name=NAME):
        validate(NAME, tensors, spec)


@pytest.mark.parametrize(("spec", "key"), EVERY_TENSOR, ids=tensor_id)
def test_wrong_dtype(spec, key):
    tensors = random_tensors(spec, seed=5)
    if key in BOOKS + NORM:
        wrong, expected = [torch.float64, torch.int16, torch.float8_e4m3fn], ["float16", "bfloat16", "float32"]
    elif key == "indices" and spec.is_indice_packed:
        wrong, expected = [torch.int64, torch.float32, torch.int16, torch.uint32], ["int32"]
    elif key == "perm":
        wrong, expected = [torch.int8, torch.float32, torch.float64, torch.bool], ["int16", "int64"]
    else:
        wrong, expected = [torch.int8, torch.uint8, torch.float32, torch.bool], ["int16", "float16"]
    for dtype in wrong:
        with refusal(key, str(dtype).removeprefix("torch."), "expected", *expected, name=NAME):
            validate(NAME, tensors | {key: tensors[key].to(dtype)}, spec)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", BOOK_DTYPES, ids=str)
@pytest.mark.parametrize("key", BOOKS + NORM)
def test_values_that_are_not_finite(key, dtype, value):
    for spec in (EVERYTHING, PACKED):
        tensors = random_tensors(spec, seed=6, dtype=dtype)
        tensors[key].view(-1)[-1] = value
        with refusal(key, "NaN or inf", "expected finite", name=NAME):
            validate(NAME, tensors, spec)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.float16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("key", "stop"), [("indices", 8), ("res_indices", 4), ("outlier_indices", 5)])
def test_index_beyond_its_book(key, stop, dtype):
    for index in (stop, stop + 1, 255, 32768, 65535):
        tensors = random_tensors(EVERYTHING, seed=7, index_dtype=dtype)
        tensors[key].view(-1)[3:4] = disguise(torch.tensor([index]), dtype)
        with refusal(key, index, "expected 0 to", stop - 1, name=NAME):
            validate(NAME, tensors, EVERYTHING)


@pytest.mark.parametrize("key", ["indices", "res_indices", "outlier_indices"])
def test_negative_index(key):
    tensors = random_tensors(EVERYTHING, seed=8, index_dtype=torch.int64)
    tensors[key].view(-1)[2] = -1
    with refusal(key, -1, "expected 0 to", name=NAME):
        validate(NAME, tensors, EVERYTHING)


def test_outlier_index_beyond_its_book_in_a_packed_layer():
    tensors = random_tensors(PACKED, seed=9)
    tensors["outlier_indices"][0, 1, 1] = 5
    with refusal("outlier_indices", 5, "expected 0 to 4", name=NAME):
        validate(NAME, tensors, PACKED)


BAD_PERMS = [("int16", -1, 65535), ("int64", -1, -1), ("int64", 22, 22), ("int16", 23, 23), ("int64", None, None)]


@pytest.mark.parametrize(("dtype", "written", "found"), BAD_PERMS)
def test_perm_that_is_none(dtype, written, found):
    """The last entry is out of range or, for None, a duplicate of the first; the message has to say which."""
    tensors = random_tensors(PACKED, seed=10, index_dtype=getattr(torch, dtype))
    tensors["perm"][-1] = tensors["perm"][0] if written is None else written
    with refusal("perm", "permutation of 0 to 21", name=NAME):
        validate(NAME, tensors, PACKED)
    found = int(tensors["perm"][0]) if found is None else found
    with pytest.raises(VPTQFormatError, match=rf"(?<![\d-]){found}(?!\d)"):
        validate(NAME, tensors, PACKED)


@few(150)
@given(spec=specs(max_out=12, max_group_size=6, max_bits=6), seed=st.integers(0, 2**32), data=st.data())
def test_what_validate_lets_through_can_be_dequantized(spec, seed, data):
    tensors = random_tensors(spec, seed)
    key = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[key].clone()
    if data.draw(st.booleans()):
        bits = tensor.view(-1).view(torch.uint8)
        bits[data.draw(st.integers(0, bits.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        tensor = tensor.to(data.draw(st.sampled_from([torch.int64, torch.int32, torch.bfloat16, torch.float64])))
    try:
        validate(NAME, tensors | {key: tensor}, spec)
    except VPTQFormatError as error:
        assert is_one_line_about(error, NAME)
        assert key in str(error)
    else:
        weight = dequantize(tensors | {key: tensor}, spec, torch.float64)
        assert weight.shape == spec.shape
        assert bool(weight.isfinite().all())
