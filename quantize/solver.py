"""One linear layer: from a dense weight and the second moments of its inputs to a module of the VPTQ format.

The loss is that of GPTQ and VPTQ, ``tr((W - Q) H (W - Q)^T)``, or ``tr(G (W - Q) H (W - Q)^T)`` where output rows are
coupled by what the end loss feels (:class:`quantize.slab.Coupling`). Steps: normalise columns (and H along with them,
so that the loss stays the same), order columns by importance, train books by weighted k-means, walk over the columns
with error feedback, then refine: books and norm by least squares with indices fixed, indices by coordinate descent with
those fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.columns import Codes, Segment, as_vectors, decode, loss, sweep, walk
from quantize.coupled import sweep_coupled, walk_coupled
from quantize.devices import Clock
from quantize.errors import QuantizeError
from quantize.hessian import damp
from quantize.kmeans import Books, kmeans, train_books
from quantize.recipe import LayerRecipe, Recipe
from quantize.refine import fit_books, fit_norm
from quantize.slab import Coupling, Slab
from vllm_vptq.format import LayerSpec, dequantize, pack_indices

_SAMPLES_PER_CENTROID = 256
_MOST_SAMPLES = 1 << 21
"""Of books with many centroids, whose k-means would otherwise take longer than all the rest."""


@dataclass(frozen=True)
class Solution:
    """A coded layer: its tensors on the CPU, its weight on the device, its error ``tr(E H E^T) / tr(W H W^T)``.

    With coupled rows the error is ``tr(G E H E^T) / tr(G W H W^T)``.
    ``steps`` holds that error after each step, the walk and every round; ``seconds`` the time of each kind of work.
    """

    spec: LayerSpec
    tensors: dict[str, Tensor]
    weight: Tensor
    error: float
    steps: dict[str, float]
    seconds: dict[str, float]


def solve(
    weight: Tensor,
    moment: Tensor,
    layer: LayerRecipe,
    recipe: Recipe,
    dtype: torch.dtype,
    curvature: Tensor | None = None,
) -> Solution:
    """Codes ``weight [out_features, in_features]``; ``dtype`` is what books and norms are stored in.

    ``moment`` is ``H [in_features, in_features]``, or ``[G, in_features, in_features]`` with one for each group of
    output rows, see :func:`row_groups`. With one, ``curvature [out_features, out_features]`` couples the rows, see
    :class:`quantize.slab.Coupling`. The result depends on the arguments and the seed alone.
    """
    target = weight.float()
    if not bool(torch.isfinite(target).all()):
        raise QuantizeError("its weight holds NaN or infinite values")
    moments = moment[None] if moment.ndim == 2 else moment
    spec = layer.spec(*target.shape)
    clock = Clock(target.device)
    with clock("setup"):
        state = _State(target, moments, spec, recipe, dtype, clock, curvature)
    steps = {}
    if recipe.algorithm == "vptq":
        with clock("walk"):
            state.code_as_vptq()
    else:
        with clock("k-means"):
            state.segments = [replace(s, books=books) for s, books in zip(state.segments, state.train(), strict=True)]
        with clock("walk"):
            state.walk()
    with clock("errors"):
        steps["walk"] = state.error()
    for i in range(recipe.rounds):
        state.refine()
        with clock("errors"):
            steps[f"round {i + 1}"] = state.error()
    groups = state.groups
    with clock("export"):
        tensors = state.tensors()
        del state
        result = dequantize(tensors, spec)
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with clock("errors"):
        error = relative_error(target, result, moments, groups, curvature)
    return Solution(spec, on_cpu, result, error, steps, dict(clock.seconds))


def row_groups(out_features: int, count: int, spec: LayerSpec) -> list[slice]:
    """At most ``count`` groups of output rows, of about one size, that cut no vector of the spec in two."""
    unit = _unit(spec)
    size = math.ceil(out_features / count / unit) * unit
    return [slice(start, min(start + size, out_features)) for start in range(0, out_features, size)]


def _unit(spec: LayerSpec) -> int:
    """Output rows that are whole vectors in every segment."""
    return math.lcm(spec.vector_len, spec.outlier_vector_len or 1)


def stored_order(order: Tensor) -> Tensor:
    """A permutation int64 ``[columns]`` of up to 65536 columns in 16 bits, which readers take as unsigned."""
    return order.to(torch.int32).to(torch.int16)


def relative_error(
    weight: Tensor, result: Tensor, moments: Tensor, groups: list[slice], curvature: Tensor | None = None
) -> float:
    """``tr(E H E^T) / tr(W H W^T)``, summed over row groups with moments ``[G, in_features, in_features]``.

    With a ``curvature`` of all rows, ``tr(G E H E^T) / tr(G W H W^T)``.
    """
    missed = total = torch.zeros((), device=weight.device)
    for rows, moment in zip(groups, moments, strict=True):
        error, whole = weight[rows] - result[rows], weight[rows]
        pulled, pulled_whole = error @ moment, whole @ moment
        if curvature is not None:
            pulled, pulled_whole = curvature @ pulled, curvature @ pulled_whole
        missed = missed + (pulled * error).sum()
        total = total + (pulled_whole * whole).sum()
    return float(missed / total.clamp_min(1e-30))


class _State:
    """A layer while it is being coded: its columns transposed and in coding order, its norm, books and indices."""

    def __init__(
        self,
        target: Tensor,
        moments: Tensor,
        spec: LayerSpec,
        recipe: Recipe,
        dtype: torch.dtype,
        clock: Clock,
        curvature: Tensor | None,
    ) -> None:
        self.spec, self.recipe, self.dtype, self.clock = spec, recipe, dtype, clock
        out, columns = target.shape
        self.groups = row_groups(out, len(moments), spec)
        self.coupling = None
        if curvature is not None:
            assert len(moments) == 1, "rows are coupled or have moments of their own, not both"
            self.coupling = Coupling.of(curvature, recipe.damping, _unit(spec))
        damped = [damp(moment, recipe.damping) for moment in moments]
        silent = torch.stack([dead for _, dead in damped]).all(0)
        self.weight = target.masked_fill(silent[None, :], 0.0).T
        self.scale = torch.ones(columns, device=target.device)
        self.shift = torch.zeros(columns, device=target.device)
        if spec.enable_norm:
            shift = self.weight.mean(1)
            self._set_norm((self.weight - shift[:, None]).square().mean(1).sqrt(), shift)
        total = sum(m.diagonal() * (g.stop - g.start) for (m, _), g in zip(damped, self.groups, strict=True))
        # One pair of books needs no stored order: the order of coding is then nobody's business but ours.
        self.order = torch.arange(columns, device=target.device)
        self.reordered = spec.enable_perm or (spec.group_num == 1 and not spec.outlier_size)
        if self.reordered:
            importance = torch.as_tensor(total) * self.scale.square()
            self.order = importance.argsort(descending=True, stable=True)
        self.raw: list[Tensor] = []
        while damped:  # one after another: those of 70B models hold 3 GiB each
            self.raw.append(damped.pop(0)[0][self.order][:, self.order])
        self.weight = self.weight[self.order]
        self.scale, self.shift = self.scale[self.order], self.shift[self.order]
        self.segments = _segments(spec, target.device)
        self.codes: list[list[Codes]] = []
        self.slabs = self._slabs()
        self.energy = sum(
            Slab(self.weight[:, rows], raw, self.coupling).loss(self.weight[:, rows])
            for raw, rows in zip(self.raw, self.groups, strict=True)
        )

    def _set_norm(self, scale: Tensor, shift: Tensor) -> None:
        """Rounds the norm to what is stored, so that whoever codes after it sees and mends the rounding."""
        scale = scale.to(self.dtype).float()
        self.scale = torch.where(scale != 0, scale, torch.ones_like(scale))
        self.shift = shift.to(self.dtype).float()

    def _slabs(self) -> list[Slab]:
        normal = (self.weight - self.shift[:, None]) / self.scale[:, None]
        return [
            Slab(normal[:, rows].contiguous(), moment * self.scale[:, None] * self.scale, self.coupling)
            for rows, moment in zip(self.groups, self.raw, strict=True)
        ]

    def points(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """All vectors ``[n, v]`` of a segment, and their weights ``[n]``: the diagonal of H, times what rows cost."""
        here = slice(segment.start, segment.end)
        vectors = [as_vectors(slab.target[here], segment.v) for slab in self.slabs]
        weights = [
            slab.moment.diagonal()[here, None].expand(part.shape[:2])
            for slab, part in zip(self.slabs, vectors, strict=True)
        ]
        if self.coupling is not None:
            weights = [weights[0] * as_vectors(self.coupling.row_weights()[None], segment.v).mean(2)]
        return torch.cat([v.flatten(0, 1) for v in vectors]), torch.cat([w.flatten() for w in weights])

    def train(self) -> list[Books]:
        """Books for every segment by weighted k-means, rounded to what is stored."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        books = []
        for segment in self.segments:
            points, weights = self.points(segment)
            k, r = len(segment.books.main), 0 if segment.books.residual is None else len(segment.books.residual)
            points, weights = _sample(points, weights, min(_SAMPLES_PER_CENTROID * max(k, r), _MOST_SAMPLES), generator)
            weights = weights / weights.mean().clamp_min(1e-30)
            trained = train_books(points, weights, k, r, self.recipe.iterations, self.recipe.candidates, generator)
            books.append(self._rounded(trained))
        return books

    def walk(self) -> None:
        """Codes all columns with error feedback."""
        by = walk if self.coupling is None else walk_coupled
        self.codes = [by(slab, self.segments, self.recipe.candidates) for slab in self.slabs]

    def refine(self) -> None:
        """One round: books, then the norm by least squares, then indices by coordinate descent."""
        steps = self.recipe.fit_steps
        with self.clock("refinement"):
            fitted = fit_books(self.slabs, self.segments, self.codes, steps)
            self.segments = [replace(s, books=self._rounded(s.books)) for s in fitted]
            if self.spec.enable_norm:
                factor, offset = fit_norm(self.slabs, self._decoded(), steps)
                self._set_norm(self.scale * factor, self.shift + self.scale * offset)
                self.slabs = []  # before the new ones are there: those of 70B models hold 4 GiB
                self.slabs = self._slabs()
        with self.clock("descent"):
            by = sweep if self.coupling is None else sweep_coupled
            pairs = zip(self.slabs, self.codes, strict=True)
            self.codes = [by(slab, self.segments, codes, self.recipe.candidates) for slab, codes in pairs]

    def code_as_vptq(self) -> None:
        """VPTQ's order of steps (https://arxiv.org/abs/2409.17066, algorithm 1 and its residual quantization).

        A random start for k-means over all vectors; a first walk with the main book; a residual book trained on the
        errors that walk made; a second walk over the columns from scratch, main and residual chosen greedily.
        """
        generator = torch.Generator().manual_seed(self.recipe.seed)
        iterations = self.recipe.iterations
        main_only = []
        for segment in self.segments:
            points, weights = self.points(segment)
            book = kmeans(points, weights, len(segment.books.main), iterations, generator, "random")
            main_only.append(replace(segment, books=self._rounded(Books(book, None))))
        self.codes = [walk(slab, main_only, 1) for slab in self.slabs]
        complete = []
        for i, (segment, wanted) in enumerate(zip(main_only, self.segments, strict=True)):
            if wanted.books.residual is None:
                complete.append(segment)
                continue
            points, weights = self.points(segment)
            coded = torch.cat([segment.books.decode(*codes[i]).flatten(0, 1) for codes in self.codes])
            r = len(wanted.books.residual)
            residual = kmeans(points - coded, weights, r, iterations, generator, "random")
            complete.append(replace(segment, books=self._rounded(Books(segment.books.main, residual))))
        self.segments = complete
        if any(segment.books.residual is not None for segment in complete):
            self.codes = [walk(slab, complete, 1) for slab in self.slabs]

    def error(self) -> float:
        """The relative error so far, by the damped moments."""
        pairs = zip(self.slabs, self.codes, strict=True)
        return sum(loss(slab, self.segments, codes) for slab, codes in pairs) / max(self.energy, 1e-30)

    def _decoded(self) -> list[Tensor]:
        pairs = zip(self.slabs, self.codes, strict=True)
        return [decode(slab.target.shape[1], self.segments, codes) for slab, codes in pairs]

    def _rounded(self, books: Books) -> Books:
        main, residual = (None if b is None else b.to(self.dtype).float() for b in (books.main, books.residual))
        assert main is not None
        return Books(main, residual)

    def _indices(self, segment: int) -> Codes:
        """A segment's main and residual indices ``[R, columns]`` over all row groups."""
        main, residual = zip(*(codes[segment] for codes in self.codes), strict=True)
        parts = [part for part in residual if part is not None]
        return torch.cat(main, 1).T, torch.cat(parts, 1).T if parts else None

    def tensors(self) -> dict[str, Tensor]:
        """The module's tensors as the format wants them."""
        spec, tensors = self.spec, {}
        natural = self.order.argsort()
        if spec.enable_norm:
            tensors["weight_scale"] = self.scale[natural].to(self.dtype)
            tensors["weight_bias"] = self.shift[natural].to(self.dtype)
        if spec.enable_perm:
            tensors["perm"] = stored_order(self.order)
        whole = [self._indices(i) for i in range(len(self.segments))]
        first = 1 if spec.outlier_size else 0
        if spec.outlier_size:
            tensors["outlier_indices"] = whole[0][0].to(torch.int32).to(torch.int16)[None]
            tensors["outlier_centroids.weight"] = self.segments[0].books.main.to(self.dtype).reshape(1, -1)
        packed = []
        for index, residual in whole[first:]:
            merged = index if residual is None else index | residual << spec.index_bits
            if self.reordered and not spec.enable_perm:
                merged = merged[:, natural]
            packed.append(pack_indices(merged.contiguous(), spec.total_bits))
        tensors["indices"] = torch.stack(packed)
        books = [segment.books for segment in self.segments[first:]]
        tensors["centroids.weight"] = torch.stack([b.main.flatten() for b in books]).to(self.dtype)
        if spec.num_res_centroids:
            stacked = torch.stack([b.residual.flatten() for b in books if b.residual is not None])
            tensors["res_centroids.weight"] = stacked.to(self.dtype)
        return tensors


def _segments(spec: LayerSpec, device: torch.device) -> list[Segment]:
    """A spec's segments with empty books: outliers first, then the groups."""

    def book(k: int, v: int) -> Tensor:
        return torch.zeros(k, v, device=device)

    segments = []
    if spec.outlier_size:
        outlier = Books(book(spec.num_outlier_centroids, spec.outlier_vector_len), None)
        segments.append(Segment(0, spec.outlier_size, outlier))
    for g in range(spec.group_num):
        start = spec.outlier_size + g * spec.group_size
        residual = book(spec.num_res_centroids, spec.vector_len) if spec.num_res_centroids else None
        segments.append(
            Segment(start, start + spec.group_size, Books(book(spec.num_centroids, spec.vector_len), residual))
        )
    return segments


def _sample(points: Tensor, weights: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most ``most`` of the points, weighted for those left out.

    The longest vectors are always there: a few weights far outside the rest decide over a model.
    """
    if len(points) <= most:
        return points, weights
    energy = points.square().sum(1) * weights
    sure = most // 8
    longest = energy.argsort(descending=True, stable=True)
    others = longest[sure:]
    drawn = others[torch.randperm(len(others), generator=generator)[: most - sure].to(points.device)]
    chosen = torch.cat([longest[:sure], drawn])
    stands_for = torch.ones(most, device=points.device)
    stands_for[sure:] = len(others) / (most - sure)
    return points[chosen], weights[chosen] * stands_for
