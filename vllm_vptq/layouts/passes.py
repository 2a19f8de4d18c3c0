"""What the stationary and the aligned layout pack: segments become *passes*, each over one book and eight elements of
its vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_vptq.layouts.flat import Flat
from vllm_vptq.layouts.work import ABSENT, Job, Kind
from vllm_vptq.parameters import ModuleShard, Segment

SLICE_BITS = 13
SLICE_ROWS = 1 << SLICE_BITS
"""Of 16 bytes: as many entries of a slice, or half as many if they have two planes."""
TILE_COLUMNS = 2048
RING_BYTES = 32 * 1024
"""Of activations in csrc/cuda/wide.cuh, of sums in resident.cuh; images of the books lie behind."""
LARGE_RING_BYTES = 64 * 1024
"""Of activations for 128 tokens, where books leave room."""
SHARED_BYTES = 227 * 1024
"""That a thread block can have on Hopper's and Blackwell's server cards."""
SPARE_BYTES = 3 * 1024
"""Of that, for what kernels hold beside books and the ring."""
FAR_BYTES = 12 * 8 * 1024
"""Of vectors that the 12 warps of a block gather."""
SLICED_BYTES = (SLICE_ROWS + 2 * (TILE_COLUMNS + 8)) * 16
"""A slice and activations."""
COLUMNS_PER_LOAD = {Kind.BYTES: 256, Kind.BYTE_PAIRS: 128, Kind.SHORTS: 128, Kind.FAR: 128}
"""Columns whose codes, for 16 outputs, a warp gets by one load of 16 bytes a lane."""


@dataclass(frozen=True)
class NormPlace:
    """Where a module's norm lies in the flat norm tensor: scale, then shift; ABSENT without one."""

    scale: int
    shift: int
    rows: bool

    @property
    def column_scale(self) -> int:
        return ABSENT if self.rows else self.scale

    @property
    def column_shift(self) -> int:
        return ABSENT if self.rows else self.shift


def slice_bits_of(vector_len: int) -> int:
    """Bits of an entry's place in a slice, which holds both planes of vectors that have two."""
    return SLICE_BITS - (8 < vector_len <= 16)


def store_norm(shard: ModuleShard, norm: Flat) -> NormPlace:
    """Stores a shard's norm."""
    if shard.scale is None or shard.shift is None:
        return NormPlace(ABSENT, ABSENT, False)
    at = norm.add(torch.cat([shard.scale.float(), shard.shift.float()]))
    return NormPlace(at, at + shard.scale.numel(), shard.norm_dim == 1)


@dataclass(frozen=True)
class Pass:
    """One book, the elements of its vectors from ``8 * plane``, ``width`` of them, and the codes to look up in it.

    ``book`` counts rows of 16 bytes. ``copies``: images of the book; of a FAR one, rows of an entry. FAR_BYTES:
    ``lists`` are the codes of the residual book, ``list_tiles`` their words of 16 outputs. SLICED, with a ``width`` of
    16: ``res_book`` is the second plane.
    """

    kind: Kind
    segment: Segment
    plane: int
    codes: int
    row_words: int
    book: int
    book_rows: int
    res_book: int = ABSENT
    res_rows: int = 0
    copies: int = 1
    lists: int = 0
    list_tiles: int = 0
    width: int = 8

    @property
    def slices(self) -> int:
        return -(-self.book_rows // self.slice_rows) if self.kind == Kind.SLICED else 1

    @property
    def slice_rows(self) -> int:
        """Entries of a slice, where there are slices."""
        return 1 << slice_bits_of(self.segment.vector_len)

    @property
    def rows(self) -> int:
        return self.segment.words.shape[0]

    @property
    def tiles(self) -> int:
        """Of 16 outputs: two vector rows, or two planes of one."""
        return self.rows if self.width == 16 else -(-self.rows // 2)

    def shared_bytes(self, ring_bytes: int = RING_BYTES) -> int:
        """What a thread block needs to look up in this book."""
        if self.kind == Kind.SLICED:
            return SLICED_BYTES
        gathered = FAR_BYTES if self.kind in (Kind.FAR, Kind.FAR_BYTES) else 0
        return ring_bytes + self.images_bytes + gathered

    @property
    def images_bytes(self) -> int:
        if self.kind == Kind.FAR:
            return 0
        if self.kind == Kind.FAR_BYTES:
            return _round8(self.res_rows) * 16 * 8
        return (_round8(self.book_rows) + _round8(self.res_rows)) * 16 * self.copies

    def job(self, place: NormPlace, column_list: int) -> Job:
        """A job over the whole pass, its first slice if it has several, whose sums have no place yet."""
        return Job(
            kind=self.kind,
            scale=place.column_scale,
            shift=place.column_shift,
            column_list=column_list,
            column_end=self.segment.num_columns,
            row_end=self.rows if self.kind == Kind.SLICED else self.tiles,
            codes=self.codes,
            row_words=self.row_words,
            book=self.book,
            book_rows=min(self.slice_rows, self.book_rows) if self.kind == Kind.SLICED else self.book_rows,
            res_book=self.res_book,
            res_rows=self.res_rows,
            copies=self.copies,
            lists=self.lists,
            list_tiles=self.list_tiles,
            vector_len=self.segment.vector_len,
            plane=self.plane,
            width=self.width,
        )


@dataclass(frozen=True)
class Packed:
    """A segment's passes: for few tokens, for more, and pairs (main book, residual or None) that reach all weights.

    There are none for few tokens where a book would need lists, and the layout has none.
    """

    few: list[Pass]
    wide: list[Pass]
    decoded: list[tuple[Pass, Pass | None]]

    def with_lists_at(self, base: int) -> Packed:
        """The same, the flat tensor of lists having been put at ``base`` of that of codes."""
        few = [
            replace(pass_, codes=pass_.codes + base, lists=pass_.lists + base) if pass_.kind == Kind.SLICED else pass_
            for pass_ in self.few
        ]
        return replace(self, few=few)


def image_bytes(shared_bytes: int) -> int:
    """For images of books, of the shared memory that a thread block can have."""
    return shared_bytes - SPARE_BYTES - RING_BYTES


def books_of(segment: Segment) -> list[tuple[int, int]]:
    """Entries of each book, and the bits of an index into it."""
    books = [(segment.book.shape[0], segment.index_bits)]
    if segment.res_book is not None and segment.res_bits:
        books.append((segment.res_book.shape[0], segment.res_bits))
    return books


def code_kinds(segment: Segment) -> list[Kind]:
    """How codes are stored, for each book, or once for two small ones; those of a FAR book are of two bytes, too."""
    books = books_of(segment)
    kinds = [Kind.FAR if n > SLICE_ROWS else Kind.BYTES if bits <= 8 else Kind.SHORTS for n, bits in books]
    return [Kind.BYTE_PAIRS] if kinds == [Kind.BYTES, Kind.BYTES] else kinds


def wide_kinds(segment: Segment) -> set[Kind]:
    """Kinds of the passes for more than a few tokens."""
    kinds = code_kinds(segment)
    return {Kind.FAR_BYTES} if kinds == [Kind.FAR, Kind.BYTES] else set(kinds)


def resident(segment: Segment, shared_bytes: int) -> bool:
    """Whether a segment's books fit shared memory, each for itself, or both together if they are small."""
    books = books_of(segment)
    sizes = [_round8(n) * 16 * (8 if bits <= 8 else 1) for n, bits in books]
    small = all(bits <= 8 for _, bits in books)
    return max(n for n, _ in books) <= SLICE_ROWS and (sum if small else max)(sizes) <= image_bytes(shared_bytes)


def pack(segment: Segment, codes: Flat, lists: Flat | None, books: Flat, shared_bytes: int) -> Packed:
    """Packs a segment's indices and stores its books; ``lists``: also those of large books, for few tokens.

    Lists are apart from codes because their sizes depend on the indices, and what lies behind them would, too.
    """
    rows = segment.words.shape[0]
    words = torch.cat([segment.words.flatten(), segment.words.new_zeros(1)])[:-1].view(rows, -1)
    return _Packer(segment, words, codes, lists, books, shared_bytes).packed()


@dataclass(frozen=True)
class _Book:
    """One of a segment's books, and the bits of the merged index that point into it."""

    entries: Tensor
    shift: int
    width: int

    @property
    def large(self) -> bool:
        return self.entries.shape[0] > SLICE_ROWS


class _Packer:
    def __init__(
        self, segment: Segment, words: Tensor, codes: Flat, lists: Flat | None, books: Flat, shared_bytes: int
    ) -> None:
        self.segment, self.words, self.codes, self.lists, self.books = segment, words, codes, lists, books
        self.image_bytes = image_bytes(shared_bytes)
        self.main = _Book(segment.book, 0, segment.index_bits)
        self.residual = None
        if segment.res_book is not None and segment.res_bits:
            self.residual = _Book(segment.res_book, segment.index_bits, segment.res_bits)
        self.planes = -(-segment.vector_len // 8)
        self._made: dict[tuple[object, ...], int] = {}

    def packed(self) -> Packed:
        own = [self.main] if self.residual is None else [self.main, self.residual]
        few, wide, decoded = [], [], []
        if self.residual is not None and self.main.width <= 8 and self.residual.width <= 8:
            pairs = [self._pair(self.main, self.residual, plane) for plane in range(self.planes)]
            return Packed(pairs, pairs, [(pass_, None) for pass_ in pairs])
        # Two planes at once, if both books' vectors are to be had so.
        step = 2 if all(book.large for book in own) else 1
        for plane in range(0, self.planes, step):
            width = 16 if step == 2 and plane + 1 < self.planes else 8
            many = [self._far(book, plane, width) if book.large else self._resident(book, plane) for book in own]
            wide += _together(many)
            decoded.append((many[0], many[1] if len(many) > 1 else None))
        if self.lists is not None or not any(book.large for book in own):
            for book in own:
                if self.lists is not None and book.large:
                    few += self._sliced(book, self.lists)
                else:
                    few += [self._resident(book, plane) for plane in range(self.planes)]
        return Packed(few, wide, decoded)

    def _once(self, key: tuple[object, ...], make: Callable[[], int]) -> int:
        """Codes of one plane are those of the others."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _pair(self, main: _Book, residual: _Book, plane: int) -> Pass:
        at = self._plane(main, plane), self._plane(residual, plane)
        rows, res_rows = main.entries.shape[0], residual.entries.shape[0]
        codes, row_words = self._codes(Kind.BYTE_PAIRS, main, residual, rows, 8, 8)
        return Pass(Kind.BYTE_PAIRS, self.segment, plane, codes, row_words, at[0], rows, at[1], res_rows, 8)

    def _resident(self, book: _Book, plane: int) -> Pass:
        kind, rows = Kind.BYTES if book.width <= 8 else Kind.SHORTS, book.entries.shape[0]
        copies = 8 if kind == Kind.BYTES else max(1, min(3, self.image_bytes // (16 * _round8(rows))))
        codes, row_words = self._codes(kind, book, None, rows, copies, 8)
        return Pass(kind, self.segment, plane, codes, row_words, self._plane(book, plane), rows, copies=copies)

    def _far(self, book: _Book, plane: int, width: int) -> Pass:
        codes, row_words = self._codes(Kind.FAR, book, None, 0, 0, width)
        # An entry's planes beside each other: its 32 bytes then are one sector.
        at = self._once(("entries", book.shift), lambda: self.books.add(_padded(book.entries)) // 8)
        rows = book.entries.shape[0]
        return Pass(Kind.FAR, self.segment, plane, codes, row_words, at, rows, copies=self.planes, width=width)

    def _sliced(self, book: _Book, lists: Flat) -> list[Pass]:
        """One pass for a vector's two planes, or one for each plane."""
        rows, segment, tiles = book.entries.shape[0], self.segment, -(-self.segment.num_columns // TILE_COLUMNS)
        bits, slice_bits = segment.index_bits + segment.res_bits, slice_bits_of(segment.vector_len)
        entries, offsets = torch.ops.vllm_vptq.pack_sliced(
            self.words, segment.num_columns, bits, book.shift, book.width, slice_bits, -(-rows >> slice_bits), tiles
        )
        places = dict(lists=lists.add(offsets), list_tiles=tiles)
        first, planes = lists.add(entries), [self._plane(book, plane) for plane in range(self.planes)]
        if self.planes == 2:
            return [Pass(Kind.SLICED, segment, 0, first, 0, planes[0], rows, res_book=planes[1], width=16, **places)]
        return [Pass(Kind.SLICED, segment, plane, first, 0, at, rows, **places) for plane, at in enumerate(planes)]

    def _codes(
        self, kind: Kind, book: _Book, second: _Book | None, rows: int, copies: int, width: int
    ) -> tuple[int, int]:
        """Where codes lie, and the words of 16 outputs."""
        segment, loads = self.segment, -(-self.segment.num_columns // COLUMNS_PER_LOAD[kind])

        def make() -> int:
            packed = torch.ops.vllm_vptq.pack_resident(
                self.words,
                segment.num_columns,
                segment.index_bits + segment.res_bits,
                book.shift,
                book.width,
                second.shift if second else 0,
                second.width if second else 0,
                int(kind),
                loads,
                rows,
                copies,
                width,
            )
            return self.codes.add(packed)

        # Of entries of 16 elements, two lanes share a code.
        return self._once((kind, book.shift, width), make), loads * (64 if width == 16 else 128)

    def _plane(self, book: _Book, plane: int) -> int:
        """Stores elements ``8 * plane`` .. of every entry; pieces of a module share what need not be copied."""
        entries = book.entries
        if entries.shape[1] == 8 and entries.is_contiguous():
            return self.books.add(entries) // 8
        elements = entries[:, 8 * plane : 8 * plane + 8]
        return self._once(("plane", book.shift, plane), lambda: self.books.add(_padded(elements)) // 8)


def _together(passes: list[Pass]) -> list[Pass]:
    """The same look-ups in fewer passes: a residual book of bytes goes along with a far one."""
    if [pass_.kind for pass_ in passes] != [Kind.FAR, Kind.BYTES]:
        return passes
    far, small = passes
    both = replace(far, kind=Kind.FAR_BYTES, res_book=small.book, res_rows=small.book_rows)
    return [replace(both, lists=small.codes, list_tiles=small.row_words)]


def _padded(entries: Tensor) -> Tensor:
    """Entries of a multiple of 8 elements."""
    missing = -entries.shape[1] % 8
    return torch.nn.functional.pad(entries, (0, missing)).contiguous() if missing else entries.contiguous()


def _round8(n: int) -> int:
    return -(-n // 8) * 8
