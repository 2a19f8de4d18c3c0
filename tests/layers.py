"""vLLM's own linear layers without an engine: a rank of any tensor parallel group, and the loaders its models use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from tests.strategies import random_tensors
from vllm_vptq.config import VPTQConfig
from vllm_vptq.format import LayerSpec, LayerSpecs, dequantize

STYLES = ["params_dict", "load_weights", "AutoWeightsLoader"]
"""How a model's ``load_weights`` may reach a fused layer: the first in older models, the last in most."""


class Rank:
    """Makes layers believe in a tensor parallel group. A fixture: see ``rank`` below."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self(0, 1)

    def __call__(self, rank: int, size: int) -> None:
        for module in (linear, parameter):
            self._monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            self._monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    with set_current_vllm_config(VllmConfig()):
        yield Rank(monkeypatch)


class Module:
    """A checkpoint module: its spec (None if dense), its tensors, and the weight and bias they stand for."""

    def __init__(self, name: str, spec: LayerSpec | None, seed: int, shape=None, bias: bool = False) -> None:
        self.name, self.spec = name, spec
        gen = torch.Generator().manual_seed(seed)
        out, cols = spec.shape if spec else shape
        if spec is None:
            self.weight = torch.randn(out, cols, generator=gen)
            self.tensors = {"weight": self.weight.clone()}
        else:
            self.tensors = random_tensors(spec, seed)
            self.weight = dequantize(self.tensors, spec, torch.float64).float()
        self.bias = torch.randn(out, generator=gen) if bias else None

    def stored(self) -> dict[str, Tensor]:
        return self.tensors | ({} if self.bias is None else {"bias": self.bias.clone()})

    def output(self, x: Tensor) -> Tensor:
        y = x.double() @ self.weight.double().T
        return y if self.bias is None else y + self.bias


def make_config(*modules: Module, packed: dict[str, list[str]] | None = None) -> VPTQConfig:
    config = VPTQConfig(LayerSpecs({module.name: module.spec for module in modules if module.spec}))
    config.packed_modules_mapping = packed or {}
    return config


def load(layer: torch.nn.Module, modules: list[Module], ids: list, style: str = STYLES[0]) -> None:
    """Loads modules into a layer; ``ids`` are vLLM's names of the parts, None for the layer as a whole."""
    if style == "params_dict":
        parameters = dict(layer.named_parameters())
        for module, shard_id in zip(modules, ids, strict=True):
            for name, tensor in module.stored().items():
                args = () if shard_id is None else (shard_id,)
                parameters[name].weight_loader(parameters[name], tensor, *args)
        return
    mapper = WeightsMapper(
        orig_to_new_stacked={
            f"{m.name}.": ("layer.", shard_id) for m, shard_id in zip(modules, ids, strict=True) if shard_id is not None
        },
        orig_to_new_prefix={f"{m.name}.": "layer." for m, i in zip(modules, ids, strict=True) if i is None},
    )
    stored = ((f"{m.name}.{name}", tensor) for m in modules for name, tensor in m.stored().items())
    weights = list(mapper.apply(stored))
    if style == "load_weights":
        assert len(list(layer.load_weights((n.removeprefix("layer."), t) for n, t in weights))) == len(weights)
    else:
        model = torch.nn.Module()
        model.layer = layer
        AutoWeightsLoader(model).load_weights(weights)


def finish(layer: torch.nn.Module) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def output(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """What the rank computes: vLLM's forward, with the layer's bias."""
    y, bias = layer(x)
    assert bias is None
    return y


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-4)
