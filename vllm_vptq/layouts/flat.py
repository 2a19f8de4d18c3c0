"""Many tensors in one: what a layer's kernels read lies in a few flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGN_BYTES = 16
"""Streams and books start on 16 bytes, so that a kernel may load them in 16-byte accesses."""


class Flat:
    """Collects tensors for one flat tensor; the same storage twice is kept once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.align = max(1, _ALIGN_BYTES // dtype.itemsize)
        self.parts: list[Tensor] = []
        self.starts: list[int] = []
        self.size = 0
        self._seen: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def add(self, tensor: Tensor) -> int:
        """Appends a tensor and returns its offset in elements."""
        key = (tensor.data_ptr(), tensor.numel())
        if key not in self._seen:
            start = self.size + -self.size % self.align
            self._put(tensor.to(self.dtype).flatten(), start)
            # The tensor is kept with its place, so that its address stays its own.
            self._seen[key] = (start, tensor)
        return self._seen[key][0]

    def append(self, other: Flat) -> int:
        """Appends all that another one holds, and returns what its offsets are to be raised by."""
        base = self.size + -self.size % self.align
        for part, start in zip(other.parts, other.starts, strict=True):
            self._put(part, base + start)
        return base

    def _put(self, part: Tensor, start: int) -> None:
        if start > self.size:
            self.parts.append(torch.zeros(start - self.size, dtype=self.dtype, device=part.device))
            self.starts.append(self.size)
        self.parts.append(part)
        self.starts.append(start)
        self.size = start + part.numel()

    def tensor(self, device: torch.device) -> Tensor:
        return torch.cat(self.parts) if self.parts else torch.empty(0, dtype=self.dtype, device=device)

    def optional(self) -> Tensor | None:
        return torch.cat(self.parts) if self.parts else None
