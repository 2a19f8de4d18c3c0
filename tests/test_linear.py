"""vLLM's linear layers with VPTQ weights: all ranks together compute what the dense weight computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from tests.layers import STYLES, Module, assert_near, finish, load, make_config, output
from tests.layers import rank as rank  # a fixture
from vllm_vptq.format import LayerSpec, VPTQFormatError
from vllm_vptq.linear import VPTQLinearMethod

K = 72
X = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
TP = [1, 2, 3, 4, 8]
SPECS = {
    "plain": LayerSpec(K, 120, 8, 16, 4),
    "perm": LayerSpec(K, 120, 7, 32, enable_perm=True, enable_norm=True),
    "groups": LayerSpec(K, 120, 6, 8, 16, group_num=4, enable_perm=True, enable_norm=True, norm_dim=1),
    "outliers": LayerSpec(K, 120, 12, 8, 0, 2, 4, 5, 6, enable_norm=True, enable_perm=True, is_indice_packed=False),
}
PLAIN, PERM, GROUPS, OUTLIERS = SPECS.values()
FUSED_STYLES = pytest.mark.parametrize("style", STYLES)


def build(layer_class, *args, modules, leaf=None, **kwargs):
    """A layer ``l.LEAF`` of float32 that quantizes the given modules ``l.*``."""
    prefix = f"l.{leaf}" if leaf else modules[0].name
    packed = {leaf: [module.name.rpartition(".")[2] for module in modules]} if leaf else {}
    config = make_config(*modules, packed=packed)
    layer = layer_class(*args, params_dtype=torch.float32, quant_config=config, prefix=prefix, **kwargs)
    assert type(layer.quant_method) is VPTQLinearMethod
    return layer


def modules_named(names, specs, rows=None, bias=False):
    """A checkpoint module for every name; a spec of None is a dense one."""
    rows = rows or [120] * len(names)
    return [
        Module(f"l.{name}", spec and replace(spec, out_features=out), seed, (out, K), bias)
        for seed, (name, spec, out) in enumerate(zip(names, specs, rows, strict=True))
    ]


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("style", ["params_dict", "AutoWeightsLoader"])
def test_column_parallel(rank, style, spec, tp):
    (module,) = modules_named(["up_proj"], [spec], bias=True)
    outputs = []
    for r in range(tp):
        rank(r, tp)
        layer = build(ColumnParallelLinear, K, 120, modules=[module])
        load(layer, [module], [None], style)
        finish(layer)
        outputs.append(output(layer, X))
    assert_near(torch.cat(outputs, -1), module.output(X))


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("style", ["params_dict", "AutoWeightsLoader"])
def test_row_parallel(rank, style, spec, tp):
    (module,) = modules_named(["down_proj"], [spec])
    total = torch.zeros(3, 120)
    for r in range(tp):
        rank(r, tp)
        layer = build(RowParallelLinear, K, 120, bias=False, reduce_results=False, modules=[module])
        load(layer, [module], [None], style)
        finish(layer)
        total += output(layer, X.chunk(tp, -1)[r])
    assert_near(total, module.output(X))


def test_row_parallel_adds_its_bias_on_the_first_rank_only(rank):
    (module,) = modules_named(["down_proj"], [GROUPS], bias=True)
    total = torch.zeros(3, 120)
    for r in range(2):
        rank(r, 2)
        layer = build(RowParallelLinear, K, 120, modules=[module])
        load(layer, [module], [None])
        finish(layer)
        layer.reduce_results = False
        total += output(layer, X.chunk(2, -1)[r])
    assert_near(total, module.output(X))


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_replicated(rank, spec, tp):
    (module,) = modules_named(["gate"], [spec], bias=True)
    for r in range(tp):
        rank(r, tp)
        layer = build(ReplicatedLinear, K, 120, modules=[module])
        load(layer, [module], [None])
        finish(layer)
        assert_near(output(layer, X), module.output(X))


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("specs", [(PLAIN, OUTLIERS), (GROUPS, None), (None, PERM)], ids=["both", "gate", "up"])
@FUSED_STYLES
def test_merged_column_parallel(rank, style, specs, tp):
    modules = modules_named(["gate_proj", "up_proj"], specs, [120, 72], bias=True)
    outputs = []
    for r in range(tp):
        rank(r, tp)
        layer = build(MergedColumnParallelLinear, K, [120, 72], modules=modules, leaf="gate_up_proj")
        load(layer, modules, [0, 1], style)
        finish(layer)
        outputs.append(output(layer, X).split([120 // tp, 72 // tp], -1))
    for module, parts in zip(modules, zip(*outputs, strict=True), strict=True):
        assert_near(torch.cat(parts, -1), module.output(X))


@pytest.mark.parametrize("tp", [1, 2, 4])
@FUSED_STYLES
def test_merged_column_parallel_that_is_fused_on_disk(rank, style, tp):
    (module,) = modules_named(["gate_up_proj"], [OUTLIERS], [192], bias=True)
    outputs = []
    for r in range(tp):
        rank(r, tp)
        layer = build(MergedColumnParallelLinear, K, [120, 72], modules=[module])
        load(layer, [module], [None], style)
        finish(layer)
        outputs.append(output(layer, X).split([120 // tp, 72 // tp], -1))
    assert_near(torch.cat([part for parts in zip(*outputs, strict=True) for part in parts], -1), module.output(X))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("specs", [(PERM, PLAIN), (GROUPS, None)], ids=["both", "first"])
@FUSED_STYLES
def test_a_module_for_three_outputs_of_four(rank, style, specs, tp):
    """As ``in_proj_qkv`` and ``in_proj_z`` behind one layer; the loader names the span."""
    modules, sizes = modules_named(["in_qkv", "in_z"], specs, [64, 40]), [24, 24, 16, 40]
    outputs = []
    for r in range(tp):
        rank(r, tp)
        layer = build(MergedColumnParallelLinear, K, sizes, bias=False, modules=modules, leaf="in_proj")
        load(layer, modules, [(0, 1, 2), 3], style)
        finish(layer)
        outputs.append(output(layer, X).split([size // tp for size in sizes], -1))
    found = torch.cat([part for parts in zip(*outputs, strict=True) for part in parts], -1)
    assert_near(found, torch.cat([module.output(X) for module in modules], -1))


HEADS = [(1, 2), (2, 2), (3, 3), (3, 1), (4, 2), (8, 2), (8, 4), (8, 8), (8, 24)]


def qkv_ranks(rank, tp, kv_heads, modules, ids, style, leaf="qkv_proj", v_head=5):
    """What q, k and v of the layer compute, over all ranks; heads are 5 wide, so no shard suits a vector."""
    q, k, v = [], [], []
    for r in range(tp):
        rank(r, tp)
        args = {"v_head_size": v_head} if v_head != 5 else {}
        layer = build(QKVParallelLinear, K, 5, 24, kv_heads, modules=modules, leaf=leaf, **args)
        load(layer, modules, ids, style)
        finish(layer)
        local = max(kv_heads // tp, 1)
        for outputs, part in zip(
            (q, k, v), output(layer, X).split([120 // tp, local * 5, local * v_head], -1), strict=True
        ):
            outputs.append(part)
    replicas = max(tp // kv_heads, 1)
    for outputs in (k, v):
        for i in range(tp):
            assert torch.equal(outputs[i], outputs[i - i % replicas])
    return torch.cat(q, -1), torch.cat(k[::replicas], -1), torch.cat(v[::replicas], -1)


@pytest.mark.parametrize(("tp", "kv_heads"), HEADS)
@pytest.mark.parametrize("v_head", [5, 7])
@pytest.mark.parametrize("specs", [(OUTLIERS, PLAIN, GROUPS), (PERM, None, PLAIN)], ids=["all", "without k"])
def test_qkv_parallel(rank, specs, v_head, tp, kv_heads):
    rows = [120, kv_heads * 5, kv_heads * v_head]
    modules = modules_named(["q_proj", "k_proj", "v_proj"], specs, rows, bias=True)
    for style in STYLES if tp < 4 else STYLES[:1]:
        found = qkv_ranks(rank, tp, kv_heads, modules, ["q", "k", "v"], style, v_head=v_head)
        for module, y in zip(modules, found, strict=True):
            assert_near(y, module.output(X))


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 2), (3, 3), (4, 2), (8, 4)])
@FUSED_STYLES
def test_qkv_parallel_that_is_fused_on_disk(rank, style, tp, kv_heads):
    modules = modules_named(["qkv_proj"], [OUTLIERS], [120 + kv_heads * 10], bias=True)
    found = qkv_ranks(rank, tp, kv_heads, modules, [None], style, leaf=None)
    assert_near(torch.cat(found, -1), modules[0].output(X))


@pytest.mark.parametrize("layer_class", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear])
def test_disable_tp(rank, layer_class):
    (module,) = modules_named(["proj"], [OUTLIERS], bias=True)
    rank(2, 3)
    layer = build(layer_class, K, 120, disable_tp=True, modules=[module])
    load(layer, [module], [None])
    finish(layer)
    assert_near(output(layer, X), module.output(X))


def test_disable_tp_of_fused_layers(rank):
    rank(2, 3)
    modules = modules_named(["gate_proj", "up_proj"], [PERM, OUTLIERS], [40, 50])
    layer = build(MergedColumnParallelLinear, K, [40, 50], bias=False, disable_tp=True, modules=modules, leaf="gate_up")
    load(layer, modules, [0, 1])
    finish(layer)
    assert_near(output(layer, X), torch.cat([module.output(X) for module in modules], -1))
    modules = modules_named(["q_proj", "k_proj", "v_proj"], [PERM, OUTLIERS, PLAIN], [35, 10, 10])
    layer = build(QKVParallelLinear, K, 5, 7, 2, bias=False, disable_tp=True, modules=modules, leaf="qkv_proj")
    load(layer, modules, ["q", "k", "v"])
    finish(layer)
    assert_near(output(layer, X), torch.cat([module.output(X) for module in modules], -1))


@pytest.mark.skipif(not hasattr(vllm_linear, "KimiK3MergedQKVGateLinear"), reason="this vLLM's layers take no rank")
def test_rank_and_size_are_the_layers_own(rank):
    """vLLM's DCP layers shard more coarsely than the group of ranks."""
    rank(7, 8)
    (module,) = modules_named(["q_b_proj"], [PERM])
    outputs = []
    for r in range(3):
        layer = build(ColumnParallelLinear, K, 120, bias=False, modules=[module], tp_rank=r, tp_size=3)
        load(layer, [module], [None])
        finish(layer)
        outputs.append(output(layer, X))
    assert_near(torch.cat(outputs, -1), module.output(X))


@pytest.mark.skipif(not hasattr(vllm_linear, "KimiK3MergedQKVGateLinear"), reason="this vLLM has no such layers")
def test_layers_that_shard_in_their_own_way_are_refused(rank):
    rank(1, 2)
    modules = modules_named(["q_proj", "k_proj", "v_proj", "iq", "ik"], [PLAIN] * 5, [20, 10, 10, 10, 5])
    config = make_config(*modules, packed={"qkv_proj": [m.name.rpartition(".")[2] for m in modules]})
    with pytest.raises(VPTQFormatError, match=r"\Al\.qkv_proj: MinimaxM3\w+ .*modules_to_not_convert"):
        vllm_linear.MinimaxM3QKVParallelLinearWithIndexer(K, 5, 4, 2, 2, 5, quant_config=config, prefix="l.qkv_proj")
    modules = modules_named(["q_a", "kv_a", "gate"], [PLAIN] * 3, [20, 10, 20])
    config = make_config(*modules, packed={"qkv_gate": [m.name.rpartition(".")[2] for m in modules]})
    with pytest.raises(VPTQFormatError, match=r"\Al\."):
        vllm_linear.KimiK3MergedQKVGateLinear(K, 20, 6, 4, 4, 5, quant_config=config, prefix="l.qkv_gate")


@pytest.mark.parametrize(("out", "cols", "key"), [(119, K, "out_features"), (120, K + 8, "in_features")])
def test_a_layer_of_another_size_than_configured(rank, out, cols, key):
    (module,) = modules_named(["proj"], [PLAIN])
    size = out if key == "out_features" else cols
    with pytest.raises(VPTQFormatError, match=rf"\Al\.proj: .*{key}.*{size}\Z"):
        build(ColumnParallelLinear, cols, out, modules=[module])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activation_dtypes(rank, dtype):
    (module,) = modules_named(["proj"], [PERM])
    config = make_config(module)
    layer = RowParallelLinear(K, 120, bias=False, params_dtype=dtype, quant_config=config, prefix=module.name)
    load(layer, [module], [None])
    finish(layer)
    y = output(layer, X.to(dtype))
    assert y.dtype == layer.codebooks.dtype == dtype
    torch.testing.assert_close(y.double(), module.output(X.to(dtype)), rtol=0.02, atol=0.5)
