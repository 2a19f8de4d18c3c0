"""A coded linear as a torch module whose books and norm can be trained; its indices stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from quantize import native
from quantize.sums import IndexedSums
from vllm_vptq.format import LayerSpec, column_blocks


@dataclass(frozen=True)
class _Segment:
    """Columns with books of their own, which are rows of parameters: ``group`` of ``main`` and of ``residual``.

    Vectors have ``v`` weights. Indices are int32 ``[R, C]``; ``where`` holds the columns' numbers in the weight, int32
    ``[C]``. ``sums`` are of the rows of each book's entries, where compiled code takes them.
    """

    main: str
    residual: str | None
    group: int
    v: int
    index: Tensor
    residual_index: Tensor | None
    where: Tensor
    sums: tuple[IndexedSums, ...]


class CodedLinear(nn.Module):
    """``y = x W^T + b`` with W decoded from float32 parameters on every call, rounded to the dtype of x.

    Parameters carry the names of the format (``centroids``, ``res_centroids``, ``outlier_centroids``, ``weight_scale``,
    ``weight_bias``) and its shapes; :meth:`tensors` gives them back in the dtype of the books on disk. On a GPU W is
    decoded again for the backward pass, not kept until then: gigabytes.
    """

    def __init__(self, tensors: dict[str, Tensor], spec: LayerSpec, bias: Tensor | None) -> None:
        super().__init__()
        assert spec.norm_dim == 0, "norms of rows are read, not written"
        self.spec = spec
        self.bias = bias
        self._stored = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
        for name in self._stored:
            self.register_parameter(name.removesuffix(".weight"), nn.Parameter(tensors[name].float()))
        self._compiled = native.decodes(tensors["indices"].device)
        self._segments = []
        first = 1 if spec.outlier_size else 0
        for i, block in enumerate(column_blocks(tensors, spec)):
            main, residual = block.read(0, block.vector_rows)
            index, second = main.int(), None if residual is None else residual.int()
            names = ("outlier_centroids", None) if i < first else ("centroids", "res_centroids")
            pairs = [(index, block.book)] + ([] if second is None else [(second, block.res_book)])
            sums = tuple(IndexedSums(one.flatten(), len(book)) for one, book in pairs) if self._compiled else ()
            self._segments.append(
                _Segment(
                    names[0],
                    None if second is None else names[1],
                    max(0, i - first),
                    block.book.shape[1],
                    index,
                    second,
                    block.columns.int(),
                    sums,
                )
            )
        order = torch.cat([segment.where for segment in self._segments])
        in_order = bool((order == torch.arange(len(order), device=order.device)).all())
        self._inverse = None if in_order else order.argsort()
        """Where the weight's columns are among those of all segments, unless they are in order."""

    def _books(self, segment: _Segment) -> tuple[Tensor, Tensor | None]:
        """Main ``[k, v]`` and residual ``[r, v]``."""
        names = (segment.main, segment.residual)
        main, residual = (None if n is None else getattr(self, n)[segment.group].view(-1, segment.v) for n in names)
        assert main is not None
        return main, residual

    def weight(self) -> Tensor:
        """W float32 ``[out_features, in_features]``, differentiable in the parameters."""
        parts = []
        for segment in self._segments:
            main, residual = self._books(segment)
            part = nn.functional.embedding(segment.index, main)
            if segment.residual_index is not None and residual is not None:
                part = part + nn.functional.embedding(segment.residual_index, residual)
            parts.append(part.transpose(1, 2).flatten(0, 1)[: self.spec.shape[0]])
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if self._inverse is not None:
            weight = weight.index_select(1, self._inverse)
        return weight * self.weight_scale + self.weight_bias if self.spec.enable_norm else weight

    def _columns(self, segment: _Segment) -> native.Columns:
        norm = (self.weight_scale, self.weight_bias) if self.spec.enable_norm else (None, None)
        where = None if self._inverse is None and len(self._segments) == 1 else segment.where
        return native.Columns(segment.index, segment.residual_index, *self._books(segment), where, *norm)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """:meth:`weight` in float32 or bfloat16, by compiled code, for :meth:`gradients` to take further."""
        weight = torch.empty(self.spec.shape, dtype=dtype, device=self.centroids.device)
        for segment in self._segments:
            native.decode(self._columns(segment), weight)
        return weight

    def gradients(self, pulled: Tensor) -> list[Tensor]:
        """The parameters' gradients, in the order of :meth:`trained`, from that of the weight."""
        rows: dict[str, list[Tensor]] = {}
        norms = []
        for segment in self._segments:
            vectors, norm = native.pull(self._columns(segment), pulled)
            for name, sums in zip((segment.main, segment.residual), segment.sums, strict=False):
                rows.setdefault(str(name), []).append(sums(vectors).flatten())
            norms.append(norm)
        found = {name: torch.stack(of_groups) for name, of_groups in rows.items()}
        if self.spec.enable_norm:
            both = torch.cat([norm for norm in norms if norm is not None], 1)
            both = both if self._inverse is None else both[:, self._inverse]
            found |= {"weight_scale": both[0], "weight_bias": both[1]}
        return [found[name] for name in self.trained()]

    def trained(self) -> dict[str, nn.Parameter]:
        """Books and norm."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "bias"}

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self._compiled and x.dtype in (torch.float32, torch.bfloat16):
            product = _Product.apply(x, self, *self.trained().values())
        elif x.is_cuda and torch.is_grad_enabled():
            product = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
        else:
            product = self._product(x)
        found: Tensor = product if self.bias is None else product + self.bias.to(x.dtype)
        return found

    def _product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight().to(x.dtype))

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by the format's names, in the dtypes they are stored in."""
        named = self.trained()
        return {name: named[name.removesuffix(".weight")].to(dtype) for name, dtype in self._stored.items()}


class _Product(torch.autograd.Function):
    """``x W^T`` of a coded linear by compiled code, given all that :meth:`CodedLinear.trained` has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: CodedLinear, *parameters: Tensor) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(x, *parameters)  # which notices if they change before they are read again
        return nn.functional.linear(x, linear.decoded(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors
        given = gradient @ ctx.linear.decoded(x.dtype) if ctx.needs_input_grad[0] else None
        pulled = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return given, None, *ctx.linear.gradients(pulled)
