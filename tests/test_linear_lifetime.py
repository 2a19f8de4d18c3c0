"""A layer's life: placeholders, missing tensors, loading again, and what vLLM reads of a finished layer."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader import reload

from tests.layers import Module, assert_near, finish, load, make_config, output
from tests.layers import rank as rank  # a fixture
from tests.strategies import EVERYTHING, refusal
from vllm_vptq.format import LayerSpec, VPTQFormatError, tensor_shapes
from vllm_vptq.linear import VPTQDequantizedLinearMethod

K = 22
X = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
Q = replace(EVERYTHING, out_features=20)
KEY = LayerSpec(K, 10, 3, 16, enable_norm=True)
KERNEL_TENSORS = ("qweight", "codebooks", "norm", "columns", "dense")


def qkv_modules(seed: int) -> list[Module]:
    """q with everything, k with a column norm, v dense."""
    return [
        Module("l.q_proj", Q, seed, bias=True),
        Module("l.k_proj", KEY, seed + 1, bias=True),
        Module("l.v_proj", None, seed + 2, (10, K), bias=True),
    ]


IDS = ["q", "k", "v"]


def qkv_layer() -> QKVParallelLinear:
    config = make_config(*qkv_modules(0), packed={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    return QKVParallelLinear(K, 5, 4, 2, params_dtype=torch.float32, quant_config=config, prefix="l.qkv_proj")


def expected(modules: list[Module]) -> torch.Tensor:
    return torch.cat([module.output(X) for module in modules], -1)


def loaded(seed: int = 0) -> QKVParallelLinear:
    layer = qkv_layer()
    load(layer, qkv_modules(seed), IDS)
    finish(layer)
    return layer


def test_placeholders_have_the_names_of_the_checkpoint_and_no_elements(rank):
    parameters = dict(qkv_layer().named_parameters())
    assert parameters.keys() == {*tensor_shapes(Q), *tensor_shapes(KEY), "weight", "bias"}
    assert all(parameter.numel() == 0 for name, parameter in parameters.items() if name != "bias")


@pytest.mark.parametrize(
    ("part", "tensor"), [("q", name) for name in tensor_shapes(Q)] + [("k", "weight_bias"), ("v", "weight")]
)
def test_missing_tensor(rank, part, tensor):
    layer, modules = qkv_layer(), qkv_modules(0)
    del modules[IDS.index(part)].tensors[tensor]
    load(layer, modules, IDS)
    with refusal("tensor", tensor, "missing", name=f"l.{part}_proj"):
        finish(layer)


def test_nothing_loaded(rank):
    with refusal("missing", name="l.q_proj"):
        finish(qkv_layer())


def test_a_tensor_of_another_shape_is_refused_while_loading(rank):
    layer, modules = qkv_layer(), qkv_modules(0)
    modules[1].tensors["indices"] = modules[1].tensors["indices"][:, :-1]
    with refusal("indices", name="l.k_proj"):
        load(layer, modules, IDS)


def test_finishing_twice_changes_nothing(rank):
    layer = loaded()
    before = output(layer, X)
    finish(layer)
    assert torch.equal(output(layer, X), before)


def test_loading_again_writes_into_the_same_memory(rank):
    layer = loaded(seed=0)
    addresses = {name: getattr(layer, name).data_ptr() for name in KERNEL_TENSORS}
    assert_near(output(layer, X), expected(qkv_modules(0)))
    for seed, finishes in ((10, True), (20, False), (30, True)):
        load(layer, qkv_modules(seed), IDS)
        if finishes:
            finish(layer)
        assert_near(output(layer, X), expected(qkv_modules(seed)))
        assert {name: getattr(layer, name).data_ptr() for name in KERNEL_TENSORS} == addresses


def test_loading_again_part_of_the_tensors_is_reported(rank):
    """A layer that went on with its old weights would serve a mix of two checkpoints in silence."""
    layer, modules = loaded(), qkv_modules(10)
    del modules[1].tensors["indices"]
    load(layer, modules, IDS)
    with refusal("tensor", "indices", "missing", name="l.k_proj"):
        finish(layer)


def test_loading_again_with_another_layout_is_refused(rank):
    """Two ranks, two groups: how many columns of a group lie on a rank depends on the permutation."""
    rank(0, 2)
    spec = LayerSpec(24, 8, 4, 16, group_num=2, enable_perm=True)
    first, second = Module("l.o_proj", spec, 0), Module("l.o_proj", spec, 0)
    second.tensors["perm"] = torch.arange(24, dtype=torch.int16)
    layer = RowParallelLinear(24, 8, bias=False, quant_config=make_config(first), prefix="l.o_proj")
    load(layer, [first], [None])
    finish(layer)
    with refusal("another layout", "new engine", name="l.o_proj"):
        load(layer, [second], [None])


def test_compiled_graphs_are_found_again_only_for_the_same_plans(rank):
    """They hold the plans as constants, and vLLM's key for them says nothing of how weights are laid out.

    Two ranks, two groups, as above: another permutation is another plan.
    """
    rank(0, 2)

    def keys(perm: torch.Tensor) -> list[str]:
        specs = [LayerSpec(24, 8, 4, 16, group_num=2, enable_perm=True), LayerSpec(24, 8, 4, 16)]
        modules = [Module(f"l.{leaf}", spec, 0) for leaf, spec in zip(("o_proj", "down_proj"), specs, strict=True)]
        modules[0].tensors["perm"] = perm.to(torch.int16)
        config, quantization = VllmConfig(), make_config(*modules)
        found = [config.compute_hash()]
        with set_current_vllm_config(config):
            layers = [RowParallelLinear(24, 8, bias=False, quant_config=quantization, prefix=m.name) for m in modules]
        for layer, module in zip(layers, modules, strict=True):
            load(layer, [module], [None])
            finish(layer)
            found.append(config.compute_hash())
        pickle.loads(pickle.dumps(quantization))  # as vLLM does, and with it go no layers
        return found

    first, again, other = (keys(perm) for perm in (torch.arange(24), torch.arange(24), torch.arange(24).roll(6)))
    assert first == again and first[:2] == other[:2] == [first[0]] * 2
    assert len({first[0], first[2], other[2]}) == 3


def test_vllms_layerwise_reload_is_refused(rank):
    """vLLM counts the elements a layer still needs; placeholders have none, so it would finish far too early."""
    model = torch.nn.Module()
    model.qkv_proj = layer = qkv_layer()
    reload.record_metadata_for_reloading(model)
    load(layer, qkv_modules(0), IDS)
    finish(layer)
    reload.initialize_layerwise_reload(model)
    with pytest.raises(RuntimeError, match=r"qkv_proj: vptq does not support layer-wise weight reload"):
        load(layer, qkv_modules(10), IDS)


def test_inputs_of_loading_may_be_overwritten_once_the_layer_is_finished(rank):
    layer, modules = qkv_layer(), qkv_modules(0)
    load(layer, modules, IDS)
    finish(layer)
    want = expected(modules)
    for module in modules:
        for tensor in module.tensors.values():
            tensor.zero_()
    assert_near(output(layer, X), want)


def test_loras_device_probe(rank):
    (module,) = [Module("l.o_proj", Q, 0)]
    layer = RowParallelLinear(K, 20, bias=False, quant_config=make_config(module), prefix="l.o_proj")
    load(layer, [module], [None])
    finish(layer)
    assert not hasattr(layer, "weight")
    assert _get_lora_device(layer) == torch.device("cpu")
    assert _get_lora_device(loaded()) == torch.device("cpu")


def test_dequantize_weight(rank):
    layer, modules = loaded(), qkv_modules(0)
    weight = layer.quant_method.dequantize_weight(layer)
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    assert_near(weight, torch.cat([module.weight for module in modules]))


@pytest.mark.parametrize("r", [0, 1, 2])
def test_dequantize_weight_of_a_row_parallel_rank(rank, r):
    rank(r, 3)
    module = Module("l.o_proj", LayerSpec(24, 20, 3, 8, group_num=2, enable_perm=True), 0)
    layer = RowParallelLinear(24, 20, bias=False, quant_config=make_config(module), prefix="l.o_proj")
    load(layer, [module], [None])
    finish(layer)
    assert_near(layer.quant_method.dequantize_weight(layer), module.weight[:, 8 * r : 8 * r + 8])


# ---------------------------------------------------------------------------------------------------------------
# MLA's kv_b_proj, whose weight vLLM reads itself


def kv_b_proj(module: Module, dtype: torch.dtype = torch.float32) -> ColumnParallelLinear:
    config = make_config(module)
    layer = ColumnParallelLinear(K, 20, bias=False, params_dtype=dtype, quant_config=config, prefix=module.name)
    assert type(layer.quant_method) is VPTQDequantizedLinearMethod
    layer._cpu_skip_gemm_dispatch = True  # as MLAAttention does
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("r", "tp"), [(0, 1), (0, 2), (1, 2)])
def test_kv_b_proj_is_dense_after_loading(rank, r, tp, dtype):
    rank(r, tp)
    module = Module("l.self_attn.kv_b_proj", Q, 0)
    layer = kv_b_proj(module, dtype)
    load(layer, [module], [None])
    finish(layer)
    assert type(layer.quant_method) is UnquantizedLinearMethod
    assert not [name for name in KERNEL_TENSORS if hasattr(layer, name)]
    rows = slice(r * 20 // tp, (r + 1) * 20 // tp)
    assert layer.weight.dtype == dtype
    # Books are rounded to the activation dtype before the two of them are added.
    torch.testing.assert_close(layer.weight.float(), module.weight[rows], rtol=0, atol=32 * torch.finfo(dtype).eps)
    assert_near(output(layer, X.to(dtype)), torch.nn.functional.linear(X.to(dtype), layer.weight))


def test_kv_b_proj_missing_tensor(rank):
    module = Module("l.self_attn.kv_b_proj", Q, 0)
    del module.tensors["perm"]
    layer = kv_b_proj(module)
    load(layer, [module], [None])
    with refusal("tensor", "perm", "missing", name=module.name):
        finish(layer)


def test_kv_b_proj_loads_again_into_the_same_memory(rank):
    first, second = (Module("l.self_attn.kv_b_proj", Q, seed) for seed in (0, 10))
    layer = kv_b_proj(first)
    load(layer, [first], [None])
    finish(layer)
    address = layer.weight.data_ptr()
    load(layer, [second], [None])
    finish(layer)
    assert_near(layer.weight, second.weight)
    assert layer.weight.data_ptr() == address


def test_a_failed_load_names_one_module_on_one_line(rank):
    layer, modules = qkv_layer(), qkv_modules(0)
    with pytest.raises(VPTQFormatError) as caught:
        load(layer, modules, ["q", "v", "k"])  # as if the model mixed up its parts
    assert len(str(caught.value).splitlines()) == 1
