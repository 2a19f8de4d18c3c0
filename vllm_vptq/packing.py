"""Bit streams of indices: little-endian, least significant bit first, each row starting on an int32 word."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _stream_period(bits: int) -> tuple[int, int]:
    """After how many elements and words a stream of ``bits``-bit values starts on a word again."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def unpack_indices(words: Tensor, bits: int, count: int) -> Tensor:
    """Reads ``count`` values of ``bits`` bits from each row of a little-endian, LSB-first bit stream.

    ``words`` is int32 ``[..., ceil(count * bits / 32)]``, ``bits`` 1 to 32. Returns int64 ``[..., count]``.
    """
    _check_stream(words, bits, count)
    values, span = _stream_period(bits)
    repeats = math.ceil(count / values)
    lead = words.shape[:-1]
    # Whole periods, so that position and shift are constants of a loop of at most 32 strided, vectorised steps.
    padded = torch.nn.functional.pad(words, (0, repeats * span - words.shape[-1])) if repeats else words[..., :0]
    wide = padded.reshape(*lead, repeats, span).to(torch.int64) & 0xFFFFFFFF
    out = torch.empty(*lead, repeats, values, dtype=torch.int64, device=words.device)
    mask = (1 << bits) - 1
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = wide[..., word] >> shift
        if shift + bits > 32:
            value = value | (wide[..., word + 1] << (32 - shift))
        out[..., i] = value & mask
    return out.reshape(*lead, repeats * values)[..., :count]


def pack_indices(values: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`unpack_indices`: ``[..., count]`` integers to int32 ``[..., ceil(count * bits / 32)]``.

    Each row starts on a word of its own and is padded with zero bits. ValueError for a value wider than ``bits``.
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits is {bits}, expected 1 to 32")
    values = values.to(torch.int64)
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >> bits):
        raise ValueError(f"values from {int(values.min())} to {int(values.max())} do not fit {bits} bits")
    lead, count = values.shape[:-1], values.shape[-1]
    per, span = _stream_period(bits)
    repeats = math.ceil(count / per)
    padded = torch.nn.functional.pad(values, (0, repeats * per - count)).reshape(*lead, repeats, per)
    wide = torch.zeros(*lead, repeats, span, dtype=torch.int64, device=values.device)
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        wide[..., word] |= (padded[..., i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            wide[..., word + 1] |= padded[..., i] >> (32 - shift)
    # int64 in [0, 2^32) to the int32 with the same bits.
    signed = (wide ^ 0x80000000) - 0x80000000
    return signed.to(torch.int32).reshape(*lead, repeats * span)[..., : math.ceil(count * bits / 32)].contiguous()


def _check_stream(words: Tensor, bits: int, count: int) -> None:
    if not 1 <= bits <= 32:
        raise ValueError(f"bits is {bits}, expected 1 to 32")
    if words.dtype != torch.int32:
        raise ValueError(f"words are {words.dtype}, expected torch.int32")
    if words.shape[-1] != math.ceil(count * bits / 32):
        raise ValueError(f"{words.shape[-1]} words for {count} values of {bits} bits")
