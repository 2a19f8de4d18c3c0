"""A layer's life: placeholders, missing tensors, loading again, and what vLLM reads of a finished layer."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import LoadConfig, OffloadConfig, VllmConfig, set_current_vllm_config
from vllm.config.offload import PrefetchOffloadConfig, UVAOffloadConfig
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader import reload
from vllm.platforms import current_platform

from tests.layers import Module, assert_near, finish, load, make_config, output
from tests.layers import rank as rank  # a fixture
from tests.strategies import EVERYTHING, refusal
from vllm_vptq import compat, gpu
from vllm_vptq.format import LayerSpec, VPTQFormatError, tensor_shapes
from vllm_vptq.layouts import choice
from vllm_vptq.layouts.work import LayerWork, Variant
from vllm_vptq.linear import VPTQDequantizedLinearMethod, VPTQLinearMethod

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


@pytest.fixture
def model(rank):
    """A layer in a model, loaded as vLLM does it; a norm beside it is a layer of vLLM's."""
    model = torch.nn.Module()
    model.qkv_proj, model.norm = qkv_layer(), torch.nn.LayerNorm(K)
    reload.record_metadata_for_reloading(model)
    load(model.qkv_proj, qkv_modules(0), IDS)
    finish(model.qkv_proj)
    return model


MODEL_CONFIG = SimpleNamespace(dtype=torch.float32)


def test_vllms_weight_reload(model):
    layer, parameters = model.qkv_proj, dict(model.named_parameters())
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    assert_near(output(layer, X), expected(qkv_modules(0)))
    for seed in (10, 20):
        reload.initialize_layerwise_reload(model)
        load(layer, qkv_modules(seed), IDS)
        for parameter in list(model.norm.parameters()):
            parameter.weight_loader(parameter, torch.full([K], float(seed)))
        reload.finalize_layerwise_reload(model, MODEL_CONFIG)
        assert_near(output(layer, X), expected(qkv_modules(seed)))
        assert (model.norm.weight == seed).all()
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses


def test_a_reload_without_some_tensor_is_reported(model):
    reload.initialize_layerwise_reload(model)
    modules = qkv_modules(10)
    del modules[1].tensors["indices"]
    load(model.qkv_proj, modules, IDS)
    with refusal("tensor", "indices", "missing", name="l.k_proj"):
        reload.finalize_layerwise_reload(model, MODEL_CONFIG)


def test_a_reload_of_other_layers_leaves_this_one(model):
    reload.initialize_layerwise_reload(model)
    reload.finalize_layerwise_reload(model, MODEL_CONFIG)
    assert_near(output(model.qkv_proj, X), expected(qkv_modules(0)))


def test_a_vllm_whose_reload_is_another_is_refused(rank, monkeypatch):
    """Such a vLLM would finish the layer far too early: it counts elements, and placeholders have none."""
    monkeypatch.setattr(compat, "reload_in_place", lambda *_, **__: False)
    model = torch.nn.Module()
    model.qkv_proj = layer = qkv_layer()
    reload.record_metadata_for_reloading(model)
    load(layer, qkv_modules(0), IDS)
    finish(layer)
    reload.initialize_layerwise_reload(model)
    with pytest.raises(RuntimeError, match=r"qkv_proj: vptq does not support this vLLM's weight reload"):
        load(layer, qkv_modules(10), IDS)


# ---------------------------------------------------------------------------------------------------------------
# What vLLM's configuration asks for, or is told


@pytest.mark.parametrize(
    ("option", "offload"),
    [
        ("--cpu-offload-gb", OffloadConfig(uva=UVAOffloadConfig(cpu_offload_gb=1))),
        ("--offload-group-size", OffloadConfig(prefetch=PrefetchOffloadConfig(offload_group_size=2))),
    ],
)
def test_cpu_offload_is_refused(rank, option, offload):
    """vLLM would move the empty placeholders, and serve a model as large as before."""
    with set_current_vllm_config(VllmConfig(offload_config=offload)), refusal(option, name="l.qkv_proj"):
        qkv_layer()


@pytest.mark.parametrize("load_format", ["dummy", "sharded_state", "tensorizer", "runai_streamer_sharded"])
def test_loaders_that_fill_parameters_themselves_are_refused(rank, load_format):
    """They would find empty placeholders."""
    config = VllmConfig(load_config=LoadConfig(load_format=load_format))
    with set_current_vllm_config(config), refusal(f"--load-format {load_format}", name="l.qkv_proj"):
        qkv_layer()


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_while_layers_are_laid_out(rank, shown, capsys):
    config = make_config(*qkv_modules(0), packed={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(use_tqdm_on_load=shown))):
        layers = [
            QKVParallelLinear(K, 5, 4, 2, params_dtype=torch.float32, quant_config=config, prefix="l.qkv_proj")
            for _ in range(3)
        ]
    for layer in layers:
        load(layer, qkv_modules(0), IDS)
        finish(layer)
        pickle.dumps(config)
    said = capsys.readouterr().err
    assert ("Laying out VPTQ layers: 100%" in said and "3/3" in said) == shown, said


def compile_key(seed: int = 0, prefix: str = "l.qkv_proj", spec: LayerSpec = KEY) -> str:
    config = VllmConfig()
    with set_current_vllm_config(config):
        modules = [*qkv_modules(seed)[::2], Module("l.k_proj", spec, seed + 1, bias=True)]
        made = make_config(*modules, packed={prefix.rpartition(".")[2]: ["q_proj", "k_proj", "v_proj"]})
        layer = QKVParallelLinear(K, 5, 4, 2, params_dtype=torch.float32, quant_config=made, prefix=prefix)
    # Loading may go on under another configuration: that of the model around this one.
    load(layer, modules, ["q", "v", "k"])
    finish(layer)
    return config.compute_hash()


def test_the_key_of_the_compile_cache_holds_what_graphs_hold(rank):
    """The plan is a constant of the graph; weights alone are not, in the layout of a CPU."""
    assert compile_key(0) == compile_key(10)
    assert compile_key(spec=replace(KEY, num_centroids=32)) != compile_key()
    assert compile_key(prefix="l.other_proj") != compile_key()


def test_the_key_of_the_compile_cache_follows_weights_that_change_the_plan(rank):
    """Two ranks, two groups, as above: another permutation is another plan."""
    rank(0, 2)
    spec = LayerSpec(24, 8, 4, 16, group_num=2, enable_perm=True)

    def key(perm: torch.Tensor) -> str:
        config, module = VllmConfig(), Module("l.o_proj", spec, 0)
        module.tensors["perm"] = perm.to(torch.int16)
        with set_current_vllm_config(config):
            layer = RowParallelLinear(24, 8, bias=False, quant_config=make_config(module), prefix="l.o_proj")
        unfinished = config.compute_hash()
        load(layer, [module], [None])
        finish(layer)
        assert config.compute_hash() != unfinished == VllmConfig().compute_hash()
        return config.compute_hash()

    plain, again, rolled = (key(perm) for perm in (torch.arange(24), torch.arange(24), torch.arange(24).roll(6)))
    assert plain == again != rolled


def test_configuration_is_pickled_without_its_layers(rank):
    """vLLM sends it to other processes, and compiled graphs go to its cache with it."""
    config = make_config(*qkv_modules(0), packed={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    layer = QKVParallelLinear(K, 5, 4, 2, params_dtype=torch.float32, quant_config=config, prefix="l.qkv_proj")
    load(layer, qkv_modules(0), IDS)
    unpickled = pickle.loads(pickle.dumps(config))
    assert list(unpickled.specs) == list(config.specs)
    assert len(pickle.dumps(unpickled)) == len(pickle.dumps(config)) < 10_000


def test_the_key_of_the_compile_cache_adds_up(rank):
    """The order and every one of several layers count."""

    def key(*entries):
        config = VllmConfig()
        for entry in entries:
            compat.add_to_compile_key(config, *entry)
        return config.compute_hash()

    entries = [("a", (1, 2)), ("b", (1, 2)), ("a", (2, 1))]
    assert len({key(*some) for n in range(4) for some in permutations(entries, n)}) == 1 + 3 + 6 + 6


@pytest.mark.parametrize(
    ("capability", "variable", "before", "after"),
    [
        ((9, 0), None, {}, True),
        ((10, 0), None, {}, True),
        ((9, 0), None, {"triton.enable_pdl": False}, False),
        ((8, 9), None, {}, None),
        (None, None, {}, None),
        ((9, 0), "0", {}, False),
        ((8, 9), "1", {}, True),
    ],
)
def test_compiled_kernels_overlap_ours(monkeypatch, capability, variable, before, after):
    """From Hopper on, unless torch's variable or the user's configuration decides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.delenv(compat.OVERLAP, raising=False)
    if variable:
        monkeypatch.setenv(compat.OVERLAP, variable)
    config = SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=before))
    compat.overlap_compiled_kernels(config)
    assert config.compilation_config.inductor_compile_config.get("triton.enable_pdl") is after
    assert torch._inductor.config.get_type("triton.enable_pdl") is bool  # so vLLM's patch of that name is taken


def test_layers_ask_for_it(rank, monkeypatch):
    asked = []
    monkeypatch.setattr(compat, "overlap_compiled_kernels", asked.append)
    loaded()
    assert asked == [compat.current_config()]


def test_batch_invariant_mode_is_traced_whole(rank):
    """The op of a GPU's layout, with its fake: torch.compile must not break the graph at it."""
    work = LayerWork(True, 40, K, 0, 0, [Variant(8)], [], [])
    tensor, plan = work.encode(torch.device("cpu"))
    names = ("codes", "books", "norm", "columns", "dense", "work")
    layout = choice.LayerLayout("stationary", gpu.lookup_linear, gpu.name_of(plan), K, 40 * K, names)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in zip(names, (torch.zeros(4), torch.zeros(4), None, None, None, tensor), strict=True):
                self.register_buffer(name, value)
            self.vptq_layout, self.vptq_dtype = layout, torch.float32
            self.vptq_dense_product = torch.nn.functional.linear
            self.method = VPTQLinearMethod("l", [], choice.Layers())

        def forward(self, x):
            return self.method.apply(self, x, None)

    graph = torch.export.export(Layer(), (X,), strict=True).graph
    assert [str(node.target) for node in graph.nodes if "vptq" in str(node.target)] == [
        "vllm_vptq.lookup_weight.default"
    ]
    assert any("linear" in str(node.target) for node in graph.nodes)


class GpuLayout:
    """A layout with names of its own, as those of GPUs have, around that of the CPU."""

    tensor_names = ("codes",)

    def __init__(self, layout: Any) -> None:
        self.of, self.name, self.weights, self.plan = layout, "stationary", layout.weights, layout.plan


def test_lora_finds_the_device_of_a_layout_with_other_names(rank, monkeypatch):
    built = choice.build

    def build(*arguments):
        layout, tensors = built(*arguments)
        return GpuLayout(layout), {"codes": tensors["qweight"]}

    monkeypatch.setattr(choice, "build", build)
    layer = loaded()
    assert _get_lora_device(layer) == torch.device("cpu")
    assert [name for name, _ in layer.named_parameters() if "weight" in name] == [
        name for name, _ in qkv_layer().named_parameters() if "weight" in name
    ]


def test_batch_invariant_mode_decodes_for_vllms_product(rank, monkeypatch):
    calls = []

    def product(x, weight, bias):
        calls.append(weight.shape)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(compat, "batch_invariant_product", lambda: product)
    assert_near(output(loaded(), X), expected(qkv_modules(0)))
    assert calls == [(40, K)]


def test_batch_invariant_mode_is_only_asked_for_on_gpus(monkeypatch):
    assert compat.batch_invariant_product() is None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert compat.batch_invariant_product() is None
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    assert compat.batch_invariant_product().__name__ == "linear_batch_invariant"


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
