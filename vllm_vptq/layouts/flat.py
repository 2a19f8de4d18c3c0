"""Many tensors in one: what a layer's kernels read lies in a few flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGN_BYTES = 16
"""Streams and books start on 16 bytes, so that a kernel may load them in 16-byte accesses."""
LINE_BYTES = 128
"""A line of the caches, and what a warp loads of a list at once."""


def alike(size: int) -> int:
    """A size of lists, rounded up by 1/64 at most.

    How long lists come out depends on the indices. Sizes of tensors are constants of a compiled graph, and layers of
    one shape are to have one, not each its own.
    """
    step = 1 << max(0, size.bit_length() - 7)
    return -(-size // step) * step


class Flat:
    """Collects tensors for one flat tensor; the same storage twice is kept once. Each starts on ``align_bytes``."""

    def __init__(self, dtype: torch.dtype, align_bytes: int = _ALIGN_BYTES) -> None:
        self.dtype = dtype
        self.align = max(1, align_bytes // dtype.itemsize)
        self.parts: list[Tensor] = []
        self.size = 0
        self._seen: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def add(self, tensor: Tensor) -> int:
        """Appends a tensor and returns its offset in elements."""
        key = (tensor.data_ptr(), tensor.numel())
        if key not in self._seen:
            start = self._aligned(tensor.device, self.align)
            self.parts.append(tensor.to(self.dtype).flatten())
            self.size += tensor.numel()
            # The tensor is kept with its place, so that its address stays its own.
            self._seen[key] = (start, tensor)
        return self._seen[key][0]

    def append(self, other: Flat) -> int:
        """Appends all that another one holds, and returns what its offsets are to be raised by."""
        base = self._aligned(other.parts[0].device, other.align) if other.parts else self.size
        self.parts += other.parts
        self.size += other.size
        return base

    def pad(self, size: int) -> None:
        """Appends zeros up to a size."""
        if self.parts and size > self.size:
            self.parts.append(torch.zeros(size - self.size, dtype=self.dtype, device=self.parts[0].device))
            self.size = size

    def _aligned(self, device: torch.device, align: int) -> int:
        """Where the next tensor may start, once zeros fill the room before it."""
        if pad := -self.size % align:
            self.parts.append(torch.zeros(pad, dtype=self.dtype, device=device))
            self.size += pad
        return self.size

    def tensor(self, device: torch.device) -> Tensor:
        return torch.cat(self.parts) if self.parts else torch.empty(0, dtype=self.dtype, device=device)

    def optional(self) -> Tensor | None:
        return torch.cat(self.parts) if self.parts else None
