"""One linear layer: from a dense weight and the second moments of its inputs to a module of the VPTQ format.

The loss is that of GPTQ and VPTQ, ``tr((W - Q) H (W - Q)^T)``. Steps: normalise columns (and H along with them, so
that the loss stays the same), permute columns by importance, train books by weighted k-means, then code column after
column, spreading each column's error over those not yet coded (VPTQ's channel-independent second order).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.hessian import damp, inverse_factor
from quantize.kmeans import Books, assign, call_native, native_books, train_books
from quantize.recipe import LayerRecipe, Recipe
from vllm_vptq.format import LayerSpec, dequantize, pack_indices

_BLOCK = 128
"""Columns coded before the error is carried to the rest in one product."""
_SAMPLES_PER_CENTROID = 128


@dataclass(frozen=True)
class Solution:
    """A coded layer: its tensors on the CPU, its weight on the device, its error ``tr(E H E^T) / tr(W H W^T)``."""

    spec: LayerSpec
    tensors: dict[str, Tensor]
    weight: Tensor
    error: float


def solve(weight: Tensor, moment: Tensor, layer: LayerRecipe, recipe: Recipe, dtype: torch.dtype) -> Solution:
    """Codes ``weight [out_features, in_features]``; ``dtype`` is what books and norms are stored in.

    ``moment`` is ``H [in_features, in_features]``. The result depends on the arguments and the seed alone.
    """
    target = weight.float()
    if not bool(torch.isfinite(target).all()):
        raise QuantizeError("its weight holds NaN or infinite values")
    damped, dead = damp(moment, recipe.damping)
    spec = layer.spec(*target.shape)
    tensors: dict[str, Tensor] = {}
    normal = target.masked_fill(dead[None, :], 0.0)

    if layer.norm:
        # Rounded to what is stored, so that the error feedback sees and mends the rounding.
        shift = normal.mean(0).to(dtype)
        scale = (normal - shift.float()).square().mean(0).sqrt().to(dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        tensors |= {"weight_scale": scale, "weight_bias": shift}
        normal = (normal - shift.float()) / scale.float()
        damped = damped * scale.float()[:, None] * scale.float()[None, :]
    if layer.perm:
        perm = damped.diagonal().argsort(descending=True, stable=True)
        tensors["perm"] = perm.to(torch.int32).to(torch.int16)  # the low 16 bits, read as unsigned
        normal, damped = normal[:, perm], damped[perm][:, perm]

    # [R, columns, v]: vectors run along output rows. Rows beyond out_features are padding nobody reads.
    rows = math.ceil(target.shape[0] / spec.vector_len)
    padded = torch.nn.functional.pad(normal, (0, 0, 0, rows * spec.vector_len - target.shape[0]))
    vectors = padded.view(rows, spec.vector_len, -1).transpose(1, 2).contiguous()

    books = _train(vectors, damped.diagonal(), spec, recipe, dtype)
    index, residual = _code_with_feedback(vectors, inverse_factor(damped), books, recipe.candidates)

    merged = index if residual is None else index | residual << spec.index_bits
    tensors["indices"] = pack_indices(merged, spec.total_bits)[None]
    tensors["centroids.weight"] = books.main.to(dtype).reshape(1, -1)
    if books.residual is not None:
        tensors["res_centroids.weight"] = books.residual.to(dtype).reshape(1, -1)
    result = dequantize(tensors, spec)
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    missed = target - result
    error = (missed @ moment * missed).sum() / (target @ moment * target).sum().clamp_min(1e-30)
    return Solution(spec, on_cpu, result, float(error))


def _train(vectors: Tensor, importance: Tensor, spec: LayerSpec, recipe: Recipe, dtype: torch.dtype) -> Books:
    points = vectors.flatten(0, 1)
    weights = importance.repeat(vectors.shape[0])
    generator = torch.Generator().manual_seed(recipe.seed)
    most = _SAMPLES_PER_CENTROID * max(spec.num_centroids, spec.num_res_centroids)
    if len(points) > most:
        # The longest vectors are always there: a few weights far outside the rest decide over a model.
        energy = points.square().sum(1) * weights
        longest = energy.argsort(descending=True, stable=True)
        others = longest[most // 8 :]
        drawn = torch.randperm(len(others), generator=generator)[: most - most // 8].to(points.device)
        chosen = torch.cat([longest[: most // 8], others[drawn]])
        points, weights = points[chosen], weights[chosen]
    books = train_books(
        points,
        weights / weights.mean(),
        spec.num_centroids,
        spec.num_res_centroids,
        recipe.iterations,
        recipe.candidates,
        generator,
    )
    return Books(*(None if book is None else book.to(dtype).float() for book in (books.main, books.residual)))


def _code_with_feedback(vectors: Tensor, factor: Tensor, books: Books, candidates: int) -> tuple[Tensor, Tensor | None]:
    """Indices int64 ``[R, columns]`` of vectors ``[R, columns, v]``, columns coded from left to right."""
    rows, columns, v = vectors.shape
    # Columns outermost: the error of a block is carried on by one large matrix product.
    left = vectors.transpose(0, 1).contiguous()
    index = torch.empty(columns, rows, dtype=torch.int64, device=vectors.device)
    residual = torch.empty_like(index) if books.residual is not None else None
    code_block = _code_block_native if vectors.device.type == "cpu" else code_block_torch
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        parts = index[start:end], None if residual is None else residual[start:end]
        errors = code_block(left[start:end], factor[start:end, start:end], books, candidates, *parts)
        left[end:].view(columns - end, rows * v).addmm_(
            factor[start:end, end:].T, errors.view(end - start, rows * v), alpha=-1
        )
    return index.T.contiguous(), None if residual is None else residual.T.contiguous()


def code_block_torch(
    block: Tensor, factor: Tensor, books: Books, candidates: int, index: Tensor, residual: Tensor | None
) -> Tensor:
    """Codes a block ``[columns, R, v]`` in place of ``index`` and ``residual`` ``[columns, R]``.

    ``factor`` is the block of the inverse factor. Returns the errors ``[columns, R, v]`` over their diagonal element.
    """
    block = block.clone()
    errors = torch.empty_like(block)
    for j in range(len(block)):
        main, second = assign(block[j], books, candidates)
        index[j] = main
        if residual is not None and second is not None:
            residual[j] = second
        errors[j] = (block[j] - books.decode(main, second)) / factor[j, j]
        block[j + 1 :] -= factor[j, j + 1 :, None, None] * errors[j]
    return errors


def _code_block_native(
    block: Tensor, factor: Tensor, books: Books, candidates: int, index: Tensor, residual: Tensor | None
) -> Tensor:
    errors = torch.empty_like(block)
    columns, rows, v = block.shape
    candidates = min(candidates, len(books.main))
    arguments = (block, columns, rows, v, factor, factor.stride(0), *native_books(books), candidates)
    call_native("vptq_code_block", *arguments, index, residual, errors)
    return errors
