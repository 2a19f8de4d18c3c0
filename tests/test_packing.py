"""The bit stream of packed indices, against a loop over single bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import few
from vllm_vptq.packing import pack_indices, unpack_indices

WIDTHS = range(1, 33)


def slow_pack(values: list[int], bits: int) -> list[int]:
    stream = [(value >> i) & 1 for value in values for i in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = []
    for start in range(0, len(stream), 32):
        word = sum(bit << i for i, bit in enumerate(stream[start : start + 32]))
        words.append(word - (1 << 32) if word >> 31 else word)
    return words


def slow_unpack(words: list[int], bits: int, count: int) -> list[int]:
    def bit(t: int) -> int:
        return (words[t // 32] % (1 << 32) >> t % 32) & 1

    return [sum(bit(c * bits + i) << i for i in range(bits)) for c in range(count)]


def rows_of(bits: int) -> st.SearchStrategy[list[list[int]]]:
    """One to three rows of equally many values; the largest value is likely, for it shows a lost or stray bit."""
    top = (1 << bits) - 1
    value = st.one_of(st.integers(0, top), st.just(top))
    return st.integers(1, 70).flatmap(
        lambda count: st.lists(st.lists(value, min_size=count, max_size=count), min_size=1, max_size=3)
    )


def test_an_example_by_hand():
    packed = pack_indices(torch.tensor([0xABC, 0x123, 0xFED]), 12)
    assert [word % (1 << 32) for word in packed.tolist()] == [0xED123ABC, 0x0000000F]
    assert unpack_indices(packed, 12, 3).tolist() == [0xABC, 0x123, 0xFED]


@pytest.mark.parametrize("bits", WIDTHS)
@few(12)
@given(data=st.data())
def test_pack_and_unpack_are_the_bit_stream(bits, data):
    rows = data.draw(rows_of(bits))
    packed = pack_indices(torch.tensor(rows), bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.tolist() == [slow_pack(row, bits) for row in rows]
    unpacked = unpack_indices(packed, bits, len(rows[0]))
    assert unpacked.dtype == torch.int64
    assert unpacked.tolist() == rows


@pytest.mark.parametrize("bits", WIDTHS)
@few(8)
@given(count=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_unpack_ignores_what_follows_the_last_value(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (2, -(-count * bits // 32)), generator=generator).to(torch.int32)
    expected = [slow_unpack(row, bits, count) for row in words.tolist()]
    assert unpack_indices(words, bits, count).tolist() == expected


@pytest.mark.parametrize("bits", [1, 5, 12, 16, 24, 31, 32])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 2, 2)])
def test_leading_dimensions_are_independent_rows(bits, lead):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(1 << bits, (*lead, 37), generator=generator)
    packed = pack_indices(values, bits)
    assert packed.shape == (*lead, -(-37 * bits // 32))
    alone = torch.stack([pack_indices(row, bits) for row in values.reshape(-1, 37)])
    assert torch.equal(packed.reshape(alone.shape), alone)
    assert torch.equal(unpack_indices(packed, bits, 37), values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_pack_takes_every_integer_dtype(dtype):
    values = torch.tensor([[3, 127, 0, 64, 99], [1, 2, 126, 5, 77]])
    assert torch.equal(pack_indices(values.to(dtype), 7), pack_indices(values, 7))


def test_strided_input():
    values = torch.randint(1 << 13, (29, 6), generator=torch.Generator().manual_seed(0)).T
    packed = pack_indices(values, 13)
    assert torch.equal(packed, pack_indices(values.contiguous(), 13))
    assert torch.equal(unpack_indices(packed.T.contiguous().T, 13, 29), values)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4)])
def test_empty(shape):
    packed = pack_indices(torch.zeros(shape, dtype=torch.int64), 9)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * 9 // 32))
    assert unpack_indices(packed, 9, shape[-1]).shape == shape


@pytest.mark.parametrize("bits", [-1, 0, 33, 64])
def test_widths_outside_1_to_32_are_refused(bits):
    with pytest.raises(ValueError, match=f"{bits}.*1 to 32"):
        pack_indices(torch.tensor([1, 0]), bits)
    with pytest.raises(ValueError, match=f"{bits}.*1 to 32"):
        unpack_indices(torch.tensor([1], dtype=torch.int32), bits, 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_that_do_not_fit_are_refused(bits):
    with pytest.raises(ValueError, match=f"{1 << bits} do not fit {bits} bits"):
        pack_indices(torch.tensor([[0, 1], [1 << bits, 0]]), bits)
    with pytest.raises(ValueError, match=f"-1 to 1 do not fit {bits} bits"):
        pack_indices(torch.tensor([0, -1, 1]), bits)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32, torch.uint32])
def test_words_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=f"{dtype}.*int32"):
        unpack_indices(torch.ones(3, dtype=dtype), 8, 12)


@pytest.mark.parametrize(("words", "bits", "count"), [(0, 1, 1), (1, 32, 2), (3, 13, 8), (2, 5, 13)])
def test_too_few_words_are_refused(words, bits, count):
    with pytest.raises(ValueError, match=f"{words} words for {count} values of {bits} bits"):
        unpack_indices(torch.ones(2, words, dtype=torch.int32), bits, count)
