"""``VPTQLinearMethod``: create the parameters of a linear layer, load them, finish them, apply them.

Plain parameters with a loader of our own: vLLM's parameter classes stand for rectangular tensors that are sliced
and stacked, and VPTQ's codebooks per module, bit streams and permutations are not. Before loading, a layer has empty
parameters under the checkpoint's names; they stay, so that weights can be loaded again into the same kernel tensors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from vllm_vptq import compat
from vllm_vptq.format import LayerSpec, VPTQFormatError
from vllm_vptq.layouts import choice
from vllm_vptq.parameters import Intake, Source
from vllm_vptq.sharding import IndivisibleError, Range, qkv_shares, share

Modules = list[tuple[str, LayerSpec | None]]


class VPTQLinearMethod(LinearMethodBase):
    """The linear method of one (possibly fused) layer.

    ``modules`` are the checkpoint modules behind it, in output order; a spec of None is a module left dense.
    ``layers`` are those of the model, which share its memory.
    """

    def __init__(self, prefix: str, modules: Modules, layers: choice.Layers) -> None:
        self.prefix = prefix
        self.modules = modules
        self.layers = layers
        layers.awaited += 1

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if option := compat.cpu_offload_option():
            raise VPTQFormatError(
                self.prefix, f"vptq does not support {option}: weights stay on the GPU; leave it out, or use more GPUs"
            )
        if load_format := compat.foreign_load_format():
            raise VPTQFormatError(
                self.prefix, f"vptq does not support --load-format {load_format}: layers are made from a checkpoint's "
                "own tensors; leave it out (benchmarks/synthesize.py writes checkpoints with random weights)"
            )  # fmt: skip
        sources = find_sources(layer, self.prefix, self.modules, input_size_per_partition, output_partition_sizes)
        device = torch.get_default_device()
        layer.vptq_dtype = params_dtype
        layer.vptq_layout = None
        intake = layer.vptq_intake = Intake(sources, device, on_ready=partial(self._reloaded, layer))
        config = layer.vptq_config = compat.current_config()
        compat.overlap_compiled_kernels(config)
        if config is not None:
            self.layers.memory_share = config.cache_config.gpu_memory_utilization
            self.layers.progress = config.load_config.use_tqdm_on_load
        self.layers.expect(self.prefix, intake.loaded)
        for tensor in sorted(intake.tensor_names()):
            _add_placeholder(layer, tensor, _loader(self.prefix, intake, tensor), params_dtype)
        compat.reload_in_place(layer, finished=intake.require_whole)
        layer.vptq_dense_product = compat.batch_invariant_product()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if layer.vptq_layout is not None and layer.vptq_intake.untouched:
            return  # loaded before, and nothing new came
        layer.vptq_intake.require_ready()
        self._finish(layer)

    def _reloaded(self, layer: torch.nn.Module) -> None:
        """All modules have come; a first load waits for vLLM's call, a later one goes straight into place."""
        if layer.vptq_layout is not None:
            self._finish(layer)

    def _finish(self, layer: torch.nn.Module) -> None:
        before = layer.vptq_layout
        layout, tensors = self._lay_out(layer)
        if before is not None:
            self._replace(layer, before, layout, tensors)
            return
        self.layers.add(layout.name, layout.weights, tensors.values())
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors.values()]
        compat.add_to_compile_key(layer.vptq_config, self.prefix, (layout.name, layout.plan, shapes))
        for name, tensor in tensors.items():
            parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
        if not hasattr(layer, "qweight"):
            # vLLM's LoRA asks a quantized layer's tensor for the device, and knows some names. No second parameter.
            layer.__dict__["qweight"] = next(getattr(layer, name) for name in tensors)

    def _lay_out(self, layer: torch.nn.Module) -> tuple[choice.LayerLayout, dict[str, Tensor | None]]:
        """Turns the shards into kernel tensors, in the layout the layer has if it was loaded before."""
        intake: Intake = layer.vptq_intake
        choose = partial(self._choose, layer)
        layer.vptq_layout, tensors = choice.build(self.prefix, intake.loaded(), layer.vptq_dtype, intake.device, choose)
        intake.release()
        return layer.vptq_layout, tensors

    def _choose(self, layer: torch.nn.Module) -> str:
        before: choice.LayerLayout | None = layer.vptq_layout
        return before.name if before else self.layers.choose(self.prefix, layer.vptq_intake.device)

    def _replace(
        self,
        layer: torch.nn.Module,
        before: choice.LayerLayout,
        layout: choice.LayerLayout,
        tensors: dict[str, Tensor | None],
    ) -> None:
        """Puts reloaded weights where captured CUDA graphs read them."""
        present = {name: getattr(layer, name) for name in tensors}
        same = all(_shape(tensors[name]) == _shape(tensor) for name, tensor in present.items())
        if layout != before or not same:
            raise VPTQFormatError(self.prefix, "the weights to reload have another layout; start a new engine")
        for name, tensor in tensors.items():
            if tensor is not None:
                present[name].data.copy_(tensor)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        layout: choice.LayerLayout = layer.vptq_layout
        if layer.vptq_dense_product is not None:
            # Which kernel serves a call depends on its tokens, so this mode decodes the weight for vLLM's own product.
            return layer.vptq_dense_product(x, self.dequantize_weight(layer), bias)
        return layout.apply(x, bias, **{name: getattr(layer, name) for name in layout.tensor_names})

    def dequantize_weight(self, layer: torch.nn.Module) -> Tensor:
        """The rank's dense weight ``[out, in]`` in the activation dtype."""
        layout: choice.LayerLayout = layer.vptq_layout
        weight = layout.weight(**{name: getattr(layer, name) for name in layout.tensor_names})
        return weight.to(layer.vptq_dtype).contiguous()


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


class VPTQDequantizedLinearMethod(VPTQLinearMethod):
    """For a layer whose weight vLLM reads itself (MLA's ``kv_b_proj``): dense from the end of loading on."""

    def _finish(self, layer: torch.nn.Module) -> None:
        layout, tensors = self._lay_out(layer)
        weight = layout.weight(**tensors).to(layer.vptq_dtype).contiguous()
        if getattr(layer, "weight", None) is not None:
            layer.weight.data.copy_(weight)
            return
        self.layers.add("dequantized", layout.weights, [weight])
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        layer.quant_method = UnquantizedLinearMethod()
        layer.quant_method.process_weights_after_loading(layer)


def output_partitions(layer: torch.nn.Module) -> list[tuple[int, Range]]:
    """For each logical output of a layer: its size in the checkpoint, and the rows of it that this rank computes.

    IndivisibleError where the layer's tensor parallel degree does not divide them.
    """
    if isinstance(layer, (RowParallelLinear, ReplicatedLinear)):
        return [(size, (0, size)) for size in layer.output_partition_sizes]
    tp, rank = layer.tp_size, layer.tp_rank
    if isinstance(layer, QKVParallelLinear):
        v_head_size = getattr(layer, "v_head_size", layer.head_size)
        return qkv_shares(layer.total_num_heads, layer.total_num_kv_heads, layer.head_size, v_head_size, tp, rank)
    sizes = getattr(layer, "output_sizes", None) or [layer.output_size]
    return [(size, share(size, tp, rank, "output rows")) for size in sizes]


def input_columns(layer: torch.nn.Module) -> Range:
    """The input columns that this rank holds; IndivisibleError where the layer's degree does not divide them."""
    if isinstance(layer, RowParallelLinear):
        return share(layer.input_size, layer.tp_size, layer.tp_rank, "input columns")
    return 0, layer.input_size


def find_sources(
    layer: torch.nn.Module, prefix: str, modules: Modules, input_size: int, output_partition_sizes: list[int]
) -> list[Source]:
    """Matches checkpoint modules to a layer's outputs: one each, or one module that covers several (fused on disk)."""
    try:
        partitions, columns = output_partitions(layer), input_columns(layer)
    except IndivisibleError as error:
        raise VPTQFormatError(prefix, f"{error}; choose another --tensor-parallel-size") from error
    if [hi - lo for _, (lo, hi) in partitions] != list(output_partition_sizes) or columns[1] - columns[0] != input_size:
        raise VPTQFormatError(
            prefix, f"{type(layer).__name__} shards its weights in its own way; list it in modules_to_not_convert"
        )
    ids: list[Any] = ["q", "k", "v"] if isinstance(layer, QKVParallelLinear) else list(range(len(partitions)))
    sources, first = [], 0
    for i, (name, spec) in enumerate(modules):
        count = _covered(spec, [size for size, _ in partitions[first:]], len(modules) - i)
        taken = partitions[first : first + count]
        pieces, offset = [], 0
        for size, (lo, hi) in taken:
            pieces.append((offset + lo, offset + hi))
            offset += size
        if spec is not None:
            spec = spec.with_shape(offset, layer.input_size, name)
        span = tuple(ids[first : first + count])
        sources.append(Source(name, spec, pieces, columns, (offset, layer.input_size), shard_ids=(*span, span)))
        first += count
    if first != len(partitions):
        raise VPTQFormatError(prefix, f"{len(partitions)} outputs for {len(modules)} modules of the checkpoint")
    return sources


def _covered(spec: LayerSpec | None, sizes: list[int], modules_left: int) -> int:
    """How many of the next partitions a module covers: as many as add up to its rows."""
    if modules_left == len(sizes):
        return 1
    if modules_left == 1:
        return len(sizes)
    if spec is not None and spec.out_features is not None:
        for count in range(1, len(sizes) + 1):
            if sum(sizes[:count]) == spec.out_features:
                return count
    return 1


class _Book(torch.nn.Module):
    """Holds a parameter called ``weight``: codebooks lie one level below their module on disk."""

    weight: torch.nn.Parameter


def _add_placeholder(layer: torch.nn.Module, tensor: str, loader: Any, dtype: torch.dtype) -> None:
    stored = dtype if "centroids" in tensor or tensor.startswith("weight") else torch.int32
    parameter = torch.nn.Parameter(torch.empty(0, dtype=stored), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": loader})
    child, _, leaf = tensor.rpartition(".")
    if child:
        layer.add_module(child, _Book())
        layer = getattr(layer, child)
    layer.register_parameter(leaf, parameter)


def _loader(prefix: str, intake: Intake, tensor: str) -> Any:
    def weight_loader(param: torch.nn.Parameter, loaded_weight: Tensor, shard_id: Any = None) -> None:
        if param.is_meta:
            # Layer-wise reload in a vLLM that compat.reload_in_place does not reach.
            raise RuntimeError(f"{prefix}: vptq does not support this vLLM's weight reload; start a new engine")
        intake.load(tensor, loaded_weight, shard_id)

    return weight_loader
