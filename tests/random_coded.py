"""Coded layers of random indices, books and norms, and what one step of training takes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.coded import CodedLinear
from quantize.recipe import LayerRecipe
from vllm_vptq.format import LayerSpec, pack_indices, validate

LAYERS = {
    **{f"v{v}": LayerRecipe(vector_length=v, centroids=32, residual_centroids=0) for v in range(2, 17)},
    "two books": LayerRecipe(vector_length=4, centroids=16, residual_centroids=8),
    "no norm": LayerRecipe(vector_length=8, centroids=256, residual_centroids=4, norm=False),
    "two entries": LayerRecipe(vector_length=6, centroids=64, residual_centroids=2),
    "groups": LayerRecipe(vector_length=3, centroids=16, residual_centroids=8, groups=4, perm=True),
    "outliers": LayerRecipe(
        vector_length=6, centroids=16, residual_centroids=8, outliers=8, outlier_vector_length=5, outlier_centroids=16
    ),
}


def random_layer(layer: LayerRecipe, out: int, columns: int) -> tuple[dict[str, Tensor], LayerSpec]:
    """The tensors of a layer with random indices, books and norm."""
    spec, generator = layer.spec(out, columns), torch.Generator().manual_seed(out + columns)
    indices = torch.randint(
        1 << spec.total_bits, (spec.group_num, -(-out // spec.vector_len), spec.group_size), generator=generator
    )

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    tensors = {
        "indices": torch.stack([pack_indices(group, spec.total_bits) for group in indices]),
        "centroids.weight": random(spec.group_num, spec.num_centroids * spec.vector_len),
    }
    if spec.num_res_centroids:
        tensors["res_centroids.weight"] = random(spec.group_num, spec.num_res_centroids * spec.vector_len)
    if spec.enable_norm:
        tensors |= {"weight_scale": random(columns), "weight_bias": random(columns)}
    if spec.enable_perm:
        tensors["perm"] = torch.randperm(columns, generator=generator).short()
    if spec.outlier_size:
        rows = -(-out // spec.outlier_vector_len)
        codes = torch.randint(spec.num_outlier_centroids, (1, rows, spec.outlier_size), generator=generator)
        tensors["outlier_indices"] = codes.short()
        tensors["outlier_centroids.weight"] = random(1, spec.num_outlier_centroids * spec.outlier_vector_len)
    validate("layer", tensors, spec)
    return tensors, spec


def trained_once(tensors: dict[str, Tensor], spec: LayerSpec, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """A product and the gradients of all that went into it, by name."""
    linear = CodedLinear(tensors, spec, nn.Parameter(torch.ones(spec.shape[0]).to(tensors["indices"].device)))
    generator = torch.Generator().manual_seed(1)
    device = tensors["indices"].device
    x = torch.randn(2, 5, spec.shape[1], generator=generator).to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        product = linear(x)
    assert product.dtype == dtype
    (product.float() * torch.randn(product.shape, generator=generator).to(device)).sum().backward()
    found = {name: parameter.grad for name, parameter in linear.named_parameters()} | {"x": x.grad}
    return product.detach(), {name: gradient for name, gradient in found.items() if gradient is not None}
