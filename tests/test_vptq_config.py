"""``VPTQConfig``: which layers are quantized, and how the four generations of configurations reach it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

import vllm_vptq
from tests.layers import Module, assert_near, finish, load, output
from tests.layers import rank as rank  # a fixture
from tests.strategies import refusal
from vllm_vptq.config import VPTQConfig
from vllm_vptq.format import LayerSpec, LayerSpecs, VPTQFormatError
from vllm_vptq.linear import VPTQDequantizedLinearMethod, VPTQLinearMethod

SPEC = LayerSpec(32, 24, 4, 16)
OTHER = LayerSpec(32, 24, 6, 8, 4)
LEAF = LayerSpec(None, None, 4, 16)
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def config(layers=None, shared=None, excluded=()) -> VPTQConfig:
    made = VPTQConfig(LayerSpecs(layers or {}, shared, tuple(excluded)))
    made.packed_modules_mapping = PACKED
    return made


def method(made: VPTQConfig, prefix: str):
    return made.get_quant_method(bare(ColumnParallelLinear), prefix)


def bare(layer_class: type) -> torch.nn.Module:
    """An instance that was never initialised: the choice must rest on class and name."""
    layer = layer_class.__new__(layer_class)
    torch.nn.Module.__init__(layer)
    return layer


A = "model.layers.0.self_attn"


def attention(*leaves: str, spec: LayerSpec = SPEC) -> dict[str, LayerSpec]:
    return {f"{A}.{leaf}": spec for leaf in leaves}


@pytest.mark.parametrize("name", ["o_proj", "qkv_proj"])
def test_dense_layers(rank, name):
    made = config({"model.layers.1.self_attn.o_proj": SPEC, "model.layers.1.self_attn.q_proj": SPEC})
    assert type(method(made, f"{A}.{name}")) is UnquantizedLinearMethod


def test_a_layer_of_one_module():
    chosen = method(config(attention("o_proj")), f"{A}.o_proj")
    assert type(chosen) is VPTQLinearMethod
    assert chosen.modules == [(f"{A}.o_proj", SPEC)]


def test_a_name_without_a_parent():
    assert method(config({"proj": SPEC}), "proj").modules == [("proj", SPEC)]
    assert method(config({"q_proj": SPEC}), "qkv_proj").modules == [
        ("q_proj", SPEC),
        ("k_proj", None),
        ("v_proj", None),
    ]


@pytest.mark.parametrize("leaves", [("q_proj", "k_proj", "v_proj"), ("q_proj",), ("v_proj", "k_proj")])
def test_a_fused_layer_in_output_order(leaves):
    chosen = method(config(attention(*leaves)), f"{A}.qkv_proj")
    assert type(chosen) is VPTQLinearMethod
    wanted = ["q_proj", "k_proj", "v_proj"]
    assert chosen.modules == [(f"{A}.{leaf}", SPEC if leaf in leaves else None) for leaf in wanted]


def test_a_layer_fused_on_disk():
    chosen = method(config(attention("qkv_proj")), f"{A}.qkv_proj")
    assert chosen.modules == [(f"{A}.qkv_proj", SPEC)]


def test_shared_layers_by_leaf(rank):
    made = config({f"{A}.k_proj": OTHER}, shared={"q_proj": LEAF, "o_proj": LEAF})
    assert method(made, f"{A}.o_proj").modules == [(f"{A}.o_proj", LEAF)]
    assert method(made, f"{A}.qkv_proj").modules == [
        (f"{A}.q_proj", LEAF),
        (f"{A}.k_proj", OTHER),
        (f"{A}.v_proj", None),
    ]
    assert type(method(made, "model.layers.0.mlp.down_proj")) is UnquantizedLinearMethod


@pytest.mark.parametrize("fused", [True, False])
def test_shared_layers_compute(rank, fused):
    """A shared spec has no sizes: they are the layer's."""
    specs = [LayerSpec(32, rows, 4, 16) for rows in (20, 10, 10)]
    names = ["q_proj", "k_proj", "v_proj"]
    if fused:
        modules = [Module("l.qkv_proj", LayerSpec(32, 40, 4, 16), 0)]
    else:
        modules = [Module(f"l.{name}", spec, i) for i, (name, spec) in enumerate(zip(names, specs, strict=True))]
    made = config(shared=dict.fromkeys(["qkv_proj"] if fused else names, LEAF))
    layer = QKVParallelLinear(32, 5, 4, 2, bias=False, quant_config=made, prefix="l.qkv_proj")
    load(layer, modules, [None] if fused else ["q", "k", "v"])
    finish(layer)
    x = torch.randn(2, 32)
    assert_near(output(layer, x), torch.cat([module.output(x) for module in modules], -1))


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["o_proj"], ["q_proj"]),
        ([f"{A}.q_proj"], ["o_proj"]),
        (["self_attn"], []),
        (["model.layers.0"], []),
        (["model.layers.00", "proj", "attn"], ["o_proj", "q_proj"]),
    ],
)
def test_modules_to_not_convert(rank, excluded, left):
    for made in (
        config(attention("q_proj", "o_proj"), excluded=excluded),
        config(shared={"q_proj": SPEC, "o_proj": SPEC}, excluded=excluded),
    ):
        for leaf, layer in (("o_proj", "o_proj"), ("q_proj", "qkv_proj")):
            quantized = not isinstance(method(made, f"{A}.{layer}"), UnquantizedLinearMethod)
            assert quantized == (leaf in left)


@pytest.mark.parametrize("shared", [True, False])
def test_kv_b_proj(shared):
    made = config(None if shared else attention("kv_b_proj"), {"kv_b_proj": LEAF} if shared else None)
    assert type(method(made, f"{A}.kv_b_proj")) is VPTQDequantizedLinearMethod


def test_embeddings_and_other_modules_are_left_alone():
    made = config(attention("o_proj"))
    for layer in (bare(VocabParallelEmbedding), bare(ParallelLMHead), torch.nn.Linear(2, 2)):
        assert made.get_quant_method(layer, "lm_head") is None


@pytest.mark.parametrize("made", [config({"lm_head": SPEC}), config(shared={"lm_head": LEAF})], ids=["own", "shared"])
def test_a_quantized_lm_head_is_refused(made):
    with refusal("lm_head", "modules_to_not_convert", name="lm_head"):
        made.get_quant_method(bare(ParallelLMHead), "lm_head")


def test_a_quantized_lm_head_can_be_excluded():
    assert config({"lm_head": SPEC}, excluded=["lm_head"]).get_quant_method(bare(ParallelLMHead), "lm_head") is None


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_quantized_routed_experts_are_refused(shared):
    routed = type("RoutedExperts", (torch.nn.Module,), {})()
    made = config(shared={"gate_proj": LEAF}) if shared else config({"l.mlp.experts.3.gate_proj": SPEC})
    with refusal("experts", name="l.mlp.experts"):
        made.get_quant_method(routed, "l.mlp.experts")


def test_dense_routed_experts_are_left_alone():
    routed = type("RoutedExperts", (torch.nn.Module,), {})()
    assert config(attention("o_proj")).get_quant_method(routed, "l.mlp.experts") is None


@pytest.mark.parametrize("sizes", [[8, 8, 8], [24], [24, 24, 24], [25, 24]], ids=str)
def test_a_fused_layer_whose_modules_do_not_add_up(rank, sizes):
    made = config({"l.gate_proj": SPEC, "l.up_proj": SPEC})
    with pytest.raises(VPTQFormatError, match=r"\Al\.\w+: .*\Z"):
        MergedColumnParallelLinear(32, sizes, quant_config=made, prefix="l.gate_up_proj")


# ---------------------------------------------------------------------------------------------------------------
# Names and generations

OUTER = WeightsMapper(orig_to_new_prefix={"": "language_model."})
INNER = WeightsMapper(orig_to_new_substr={".attention.": ".self_attn."})


def test_mappers_apply_once_each():
    made = config({"model.layers.0.attention.o_proj": SPEC}, excluded=["model.layers.7", "lm_head"])
    for mapper in (OUTER, INNER, OUTER, INNER, WeightsMapper(orig_to_new_prefix=dict(OUTER.orig_to_new_prefix))):
        made.apply_vllm_mapper(mapper)
    assert list(made.specs) == ["language_model.model.layers.0.self_attn.o_proj"]
    assert {"language_model.model.layers.7", "lm_head"} <= set(made.specs.modules_to_not_convert)


def test_shared_layers_survive_a_mapper():
    made = config(shared={"o_proj": LEAF})
    made.apply_vllm_mapper(OUTER)
    assert made.specs["language_model.model.layers.0.self_attn.o_proj"] == LEAF


def test_vllm_finds_the_method():
    vllm_vptq.register()
    vllm_vptq.register()
    assert get_quantization_config("vptq") is VPTQConfig
    assert VPTQConfig().get_name() == "vptq"
    assert VPTQConfig.get_config_filenames() == []
    assert torch.bfloat16 in VPTQConfig().get_supported_act_dtypes()


NAME = "model.layers.0.mlp.down_proj"
LAYER = {NAME: SPEC.to_config()}


@pytest.mark.parametrize(
    "section",
    [
        LAYER,
        LAYER | {"quant_method": ""},  # as vLLM hands it on
        {"config_for_layers": LAYER},
        {"quant_method": "vptq", "config_for_layers": LAYER},
        {"quant_method": "vptq", "config_for_layers": LAYER, "shared_layer_config": {}},
        {"quant_method": "vptq", "config_for_layers": {}, "shared_layer_config": {"down_proj": SPEC.to_config()}},
    ],
    ids=["F0b", "F0b of vLLM", "without a method", "F1", "F2", "F2 shared"],
)
def test_sections_are_recognised_and_read(section):
    assert VPTQConfig.override_quantization_method(section, None) == "vptq"
    assert VPTQConfig.override_quantization_method(section, "vptq", hf_config=None) == "vptq"
    assert VPTQConfig.from_config(section).specs[NAME] == SPEC


@pytest.mark.parametrize(
    "section",
    [{}, {"quant_method": "awq", "bits": 4}, {"quant_method": ""}, {"bits": 4}, {"a": {"b": 1}}, None, "vptq"],
)
def test_sections_of_other_methods_are_not_ours(section):
    assert VPTQConfig.override_quantization_method(section, None) is None
    assert VPTQConfig.override_quantization_method(section, "awq", hf_config=None) is None


@pytest.mark.parametrize("holder", ["top", "text_config"])
@pytest.mark.parametrize("arguments", [{}, {"revision": "main"}], ids=["0.25", "0.32"])
def test_an_empty_config_reads_the_models(holder, arguments):
    part = {"quant_config": LAYER}
    content = part if holder == "top" else {"text_config": part}
    made = VPTQConfig()
    made.maybe_update_config("model", hf_config=SimpleNamespace(to_dict=lambda: content), **arguments)
    assert dict(made.specs) == {NAME: SPEC}


def test_a_config_that_was_read_is_not_read_again():
    made = VPTQConfig.from_config(LAYER)
    made.maybe_update_config("model", hf_config=SimpleNamespace(to_dict=lambda: {"quant_config": {}}))
    assert dict(made.specs) == {NAME: SPEC}


def test_a_model_without_a_configuration():
    made = VPTQConfig()
    with refusal("no VPTQ configuration", name="config.json"):
        made.get_quant_method(bare(linear.ReplicatedLinear), NAME)
    with pytest.raises(VPTQFormatError):
        made.maybe_update_config("model", hf_config=SimpleNamespace(to_dict=lambda: {"hidden_size": 8}))
    assert "0 layers" in repr(made)
