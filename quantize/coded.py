"""A coded linear as a torch module whose books and norm can be trained; its indices stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantize.sums import IndexedSums
from vllm_vptq.format import LayerSpec, column_blocks


class _LookUp(torch.autograd.Function):
    """Entries of a book ``[k, v]`` by an index, whose gradients are added up in an order sorted once.

    torch's own sorts every index anew for every backward pass.
    """

    @staticmethod
    def forward(ctx: Any, book: Tensor, index: Tensor, sums: IndexedSums) -> Tensor:
        ctx.sums = sums
        return nn.functional.embedding(index, book)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.sums(gradient.flatten(0, -2)), None, None


class _Reorder(torch.autograd.Function):
    """Columns in another order, whose gradients are put back by its inverse: nothing needs to be added up."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return weight[:, order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[:, ctx.inverse], None, None


class _Indices:
    """Indices int32 ``[R, C]`` into a book of ``count`` entries."""

    def __init__(self, index: Tensor, count: int) -> None:
        self._index, self._count = index.int(), count
        self._sums = IndexedSums(self._index.flatten(), count) if index.is_cuda else None

    def __call__(self, book: Tensor) -> Tensor:
        """The vectors ``[R, C, v]`` of a book ``[k, v]``, differentiable in it."""
        if self._sums is None:
            return nn.functional.embedding(self._index, book)
        found: Tensor = _LookUp.apply(book, self._index, self._sums)
        return found


class CodedLinear(nn.Module):
    """``y = x W^T + b`` with W decoded from float32 parameters on every call, in the dtype of x.

    Parameters carry the names of the format (``centroids``, ``res_centroids``, ``outlier_centroids``, ``weight_scale``,
    ``weight_bias``) and its shapes; :meth:`tensors` gives them back in the dtype of the books on disk. With
    ``recompute`` W is decoded again for the backward pass, not kept until then: some 6 bytes a weight.
    """

    def __init__(
        self, tensors: dict[str, Tensor], spec: LayerSpec, bias: Tensor | None, recompute: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        self.recompute = recompute
        self.bias = bias
        self._stored = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
        for name in self._stored:
            self.register_parameter(name.removesuffix(".weight"), nn.Parameter(tensors[name].float()))
        self._indices: list[tuple[_Indices, _Indices | None]] = []
        columns = []
        for block in column_blocks(tensors, spec):
            index, residual = block.read(0, block.vector_rows)
            second = None
            if residual is not None and block.res_book is not None:
                second = _Indices(residual, len(block.res_book))
            self._indices.append((_Indices(index, len(block.book)), second))
            columns.append(block.columns)
        stored = torch.cat(columns)
        in_order = bool((stored == torch.arange(len(stored), device=stored.device)).all())
        self._orders = None if in_order else (stored.argsort(), stored)
        """Which decoded column stands where, and the inverse."""

    def weight(self) -> Tensor:
        """W float32 ``[out_features, in_features]``, differentiable in the parameters."""
        spec, parts = self.spec, []
        for i, (index, residual) in enumerate(self._indices):
            outlier = bool(spec.outlier_size) and i == 0
            group = i - (1 if spec.outlier_size else 0)
            v = spec.outlier_vector_len if outlier else spec.vector_len
            book = self.outlier_centroids[0] if outlier else self.centroids[group]
            part = index(book.view(-1, v))
            if residual is not None:
                part = part + residual(self.res_centroids[group].view(-1, v))
            parts.append(part.transpose(1, 2).flatten(0, 1)[: spec.shape[0]])
        weight: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if self._orders is not None:
            weight = _Reorder.apply(weight, *self._orders)
        if not spec.enable_norm:
            return weight
        if spec.norm_dim == 1:
            return weight * self.weight_scale[:, None] + self.weight_bias[:, None]
        return weight * self.weight_scale + self.weight_bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self.recompute and torch.is_grad_enabled():
            product: Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
            return product
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight().to(x.dtype), bias)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by the format's names, in the dtypes they are stored in."""
        named = dict(self.named_parameters())
        return {name: named[name.removesuffix(".weight")].to(dtype) for name, dtype in self._stored.items()}
