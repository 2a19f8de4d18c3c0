"""Choosing indices where output rows are coupled: groups of rows, one after another, each by the walk over its columns.

The errors of groups that are coded are made up for by those that are not, as errors of columns are by later columns:
with ``H`` and ``G`` the two factors of the end loss's curvature, what GPTQ does on one side is done on both (YAQA,
https://arxiv.org/abs/2505.22988). Inside of a group rows count as independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.columns import Codes, Segment, decode, sweep, walk
from quantize.hessian import inverse_factor
from quantize.slab import Coupling, Slab


def walk_coupled(slab: Slab, segments: list[Segment], candidates: int) -> list[Codes]:
    """Codes a slab with coupled rows, group after group, its columns as :func:`quantize.columns.walk` does."""
    coupling = _coupling(slab)
    columns = inverse_factor(slab.moment)
    target = slab.target[:, coupling.order]
    spread = torch.zeros_like(target)
    codes = []
    for group in coupling.groups:
        before = coupling.factor[: group.start, group]
        # The best that this group can do for the errors of those before, if later ones do theirs.
        wanted = spread[:, : group.start] @ before
        codes.append(walk(Slab(target[:, group] - wanted, slab.moment), segments, candidates, columns))
        error = target[:, group] - decode(group.stop - group.start, segments, codes[-1])
        own = coupling.factor[group, group]
        spread[:, group] = torch.linalg.solve_triangular(own, error - wanted, upper=True, left=False)
    return _natural(codes, coupling, segments)


def sweep_coupled(slab: Slab, segments: list[Segment], codes: list[Codes], candidates: int) -> list[Codes]:
    """One pass of coordinate descent: every group towards what is best for it given the errors of all the others."""
    coupling = _coupling(slab)
    errors = slab.target - decode(slab.target.shape[1], segments, codes)
    grouped = _grouped(codes, coupling, segments)
    swept = []
    for group, own_codes in zip(coupling.groups, grouped, strict=True):
        rows = coupling.order[group]
        target, own = slab.target[:, rows], coupling.matrix[rows][:, rows]
        pull = errors @ coupling.matrix[:, rows] - errors[:, rows] @ own
        aim = target + torch.linalg.solve(own, pull.T).T
        swept.append(sweep(Slab(aim, slab.moment), segments, own_codes, candidates))
        errors[:, rows] = target - decode(len(rows), segments, swept[-1])
    return _natural(swept, coupling, segments)


def _coupling(slab: Slab) -> Coupling:
    assert slab.coupling is not None
    return slab.coupling


def _vectors(coupling: Coupling, v: int) -> Tensor:
    """The order of rows as one of vectors: a group's rows are whole vectors, the last of all perhaps a part."""
    return coupling.order[::v].div(v, rounding_mode="floor")


def _natural(codes: list[list[Codes]], coupling: Coupling, segments: list[Segment]) -> list[Codes]:
    """The groups' codes as those of the slab, its vectors in their own order."""
    whole = []
    for i, segment in enumerate(segments):
        back = _vectors(coupling, segment.v).argsort()
        residuals = [part for group in codes if (part := group[i][1]) is not None]
        main = torch.cat([group[i][0] for group in codes], 1)[:, back]
        whole.append((main, torch.cat(residuals, 1)[:, back] if residuals else None))
    return whole


def _grouped(codes: list[Codes], coupling: Coupling, segments: list[Segment]) -> list[list[Codes]]:
    """The slab's codes as those of its groups."""
    groups: list[list[Codes]] = [[] for _ in coupling.groups]
    for (main, residual), segment in zip(codes, segments, strict=True):
        order = _vectors(coupling, segment.v)
        for part, group in zip(groups, coupling.groups, strict=True):
            here = order[group.start // segment.v : -(-group.stop // segment.v)]
            part.append((main[:, here].contiguous(), None if residual is None else residual[:, here].contiguous()))
    return groups
