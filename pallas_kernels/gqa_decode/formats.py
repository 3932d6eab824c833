"""How keys and values of one head lie in shared memory, and how they become operands.

A tile is some rows of one head. A thread of quad q and column c reads of a tile of keys, out of
eight rows, row q: the 16 bytes (or 8) number 4i + c. The query's columns follow that order. Of a
tile of values, out of 16 rows, it reads an eighth of the rows 2c, 2c + 1, 2c + 8 and 2c + 9, the
one with number q, and pairs neighbouring rows, which transposes them. Column t of that eighth is
the column q of the product number t.

Chunks of 16 bytes are stored at their number xor `HeadFormat.swizzle(row)`: rows of 128 bytes and
more are then read without bank conflicts.
"""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.device.memory import CHUNK, WORD, load_shared
from pallas_kernels.device.mma import E2M1_POWER, bf16_of_e2m1, bf16_of_e4m3
from pallas_kernels.device.row_formats import multiply_bf16, permute
from pallas_kernels.device.simt import Thread, Value, i32, minimum_s16

_SCALE_BLOCK = 16
QUARTERS, EIGHTHS = 4, 8
# FP4 numbers are kept as 2^-92 of their value: then the scales that a cache can have, from 2^-33,
# and all up to 2^93 give bf16 numbers that are neither subnormal nor infinite.
_FP4_POWER = 92
_LARGEST_FIELD = 255  # of the exponents of a bf16: an infinity


@dataclasses.dataclass(frozen=True)
class HeadFormat:
    """One way to store the rows of a head of `dim` values.

    Attributes:
        value_bits: of a value.
        dim: of a head.
        has_scale: whether keys and values have one scale each, for all of them.
    """

    value_bits: int
    dim: int
    has_scale: bool = False

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return self.dim * self.value_bits // 8

    @property
    def scale_bytes(self) -> int:
        """Of a row's block scales."""
        return 0

    @property
    def stored_bytes(self) -> int:
        """Of a key and its value."""
        return 2 * (self.row_bytes + self.scale_bytes)

    @property
    def power(self) -> int:
        """Operands are 2^-power of what is stored."""
        return 0

    @property
    def key_bytes(self) -> int:
        """That a thread reads at a time of a row of keys."""
        return min(CHUNK, self.row_bytes // QUARTERS)

    def swizzle(self, row: Value) -> Value:
        """What the numbers of a row's chunks are xored with."""
        low = 0 if self.row_bytes // EIGHTHS > CHUNK else 1
        mix = (((row >> 1) & 1) << low) | ((((row >> 2) ^ row) & 1) << 2)
        return mix & (self.row_bytes // CHUNK - 1)

    def place(self, row: Value, byte: Value) -> Value:
        """Where a tile has a byte of a row."""
        return row * self.row_bytes + (byte ^ (self.swizzle(row) << 4))

    def query_column(self, pair: int, column: Value) -> Value:
        """The first of a thread's eight columns of the query that a pair of products takes."""
        columns = self.key_bytes * 8 // self.value_bits
        group, part = divmod(8 * pair, columns)
        return (column + QUARTERS * group) * columns + part

    def order_query(self, words: Sequence[Value]) -> list[Value]:
        """Eight columns in the order of those of `load_keys`."""
        return list(words)

    def load_keys(self, tile: Value, thread: Thread, first_row: int) -> list[Value]:
        """The thread's words of eight rows of keys, as they are stored."""
        kind = "r" * (self.key_bytes // WORD)
        words = []
        for i in range(self.row_bytes // (QUARTERS * self.key_bytes)):
            byte = (thread.column + QUARTERS * i) * self.key_bytes
            place = tile + self.place(thread.quad, byte)
            words += load_shared(place, kind, first_row * self.row_bytes)
        return words

    def load_key_factors(self, scales: Value, thread: Thread, first_row: int) -> list[Value]:
        """The factors on these words that `key_operands` takes."""
        return []

    def key_operands(
        self, words: Sequence[Value], factors: Sequence[Value], pair: int
    ) -> list[Value]:
        """Two words of B for each of a pair of products over 16 columns."""
        return list(words[4 * pair : 4 * pair + 4])

    def load_values(
        self, tile: Value, scales: Value, thread: Thread, first_row: int
    ) -> list[list[Value]]:
        """Two words of B for each 8 columns, of 16 rows of values."""
        size = self.row_bytes // EIGHTHS
        kind = "r" * (min(size, CHUNK) // WORD)
        halves = []
        for below in range(2):
            rows = []
            for parity in range(2):
                row = thread.column * 2 + parity
                words: list[Value] = []
                for start in range(0, size, CHUNK):
                    place = tile + self.place(row, thread.quad * size + start)
                    offset = (first_row + 8 * below) * self.row_bytes
                    words += load_shared(place, kind, offset)
                rows.append(words)
            first, second = rows
            halves.append(self.pair_rows(first, second, scales, thread, first_row + 8 * below))
        return [list(pair) for pair in zip(*halves, strict=True)]

    def pair_rows(
        self,
        first: Sequence[Value],
        second: Sequence[Value],
        scales: Value,
        thread: Thread,
        first_row: int,
    ) -> list[Value]:
        """Words of two rows as pairs of bf16, of both rows' values of each column."""
        selectors = ("0x5410", "0x7632")
        return [permute(a, b, s) for a, b in zip(first, second, strict=True) for s in selectors]


@dataclasses.dataclass(frozen=True)
class FP8Format(HeadFormat):
    """e4m3."""

    def key_operands(
        self, words: Sequence[Value], factors: Sequence[Value], pair: int
    ) -> list[Value]:
        """See `HeadFormat.key_operands`."""
        return [two for word in words[2 * pair : 2 * pair + 2] for two in bf16_of_e4m3(word)]

    def pair_rows(
        self,
        first: Sequence[Value],
        second: Sequence[Value],
        scales: Value,
        thread: Thread,
        first_row: int,
    ) -> list[Value]:
        """See `HeadFormat.pair_rows`."""
        return [
            pair
            for a, b in zip(first, second, strict=True)
            for selector in ("0x5140", "0x7362")
            for pair in bf16_of_e4m3(permute(a, b, selector))
        ]


@dataclasses.dataclass(frozen=True)
class FP4Format(HeadFormat):
    """e2m1 pairs and a power-of-two scale byte per 16 values, which stands for 2^(b - 127)."""

    @property
    def scale_bytes(self) -> int:
        """See `HeadFormat.scale_bytes`."""
        return self.dim // _SCALE_BLOCK

    @property
    def power(self) -> int:
        """See `HeadFormat.power`."""
        return _FP4_POWER

    def order_query(self, words: Sequence[Value]) -> list[Value]:
        """See `HeadFormat.order_query`: a word has columns that are four apart."""
        return [
            permute(words[i], words[i + 2], selector)
            for i in range(2)
            for selector in ("0x5410", "0x7632")
        ]

    def load_key_factors(self, scales: Value, thread: Thread, first_row: int) -> list[Value]:
        """See `HeadFormat.load_key_factors`: a thread's words are those of one or two blocks."""
        blocks = self.scale_bytes // QUARTERS
        row = scales + thread.quad * self.scale_bytes
        if blocks == 2:
            row = row + (thread.column >> 1) * WORD
        (codes,) = load_shared(row, "r", first_row * self.scale_bytes)
        bytes_ = [(thread.column * blocks + block) & 3 for block in range(blocks)]
        return [_factors(permute(codes, codes, byte * 0x1111)) for byte in bytes_]

    def key_operands(
        self, words: Sequence[Value], factors: Sequence[Value], pair: int
    ) -> list[Value]:
        """See `HeadFormat.key_operands`: of one word, two of which are of one block."""
        return [multiply_bf16(two, factors[pair // 2]) for two in bf16_of_e2m1(words[pair])]

    def pair_rows(
        self,
        first: Sequence[Value],
        second: Sequence[Value],
        scales: Value,
        thread: Thread,
        first_row: int,
    ) -> list[Value]:
        """See `HeadFormat.pair_rows`: a thread's columns are of one block."""
        block = thread.quad * self.scale_bytes // EIGHTHS
        row = scales + thread.column * (2 * self.scale_bytes) + (block >> 2) * WORD
        offset = first_row * self.scale_bytes
        (a,) = load_shared(row, "r", offset)
        (b,) = load_shared(row, "r", offset + self.scale_bytes)
        byte = block & 3
        factor = _factors(permute(a, b, byte * 0x1111 + 0x4400))
        pairs = [
            pair
            for x, y in zip(first, second, strict=True)
            for selector in ("0x5410", "0x7632")
            for pair in bf16_of_e2m1(permute(x, y, selector))
        ]
        return [multiply_bf16(pair, factor) for pair in pairs]


def _factors(codes: Value) -> Value:
    """Two scale bytes, each twice in a half of a word, as the factors on `bf16_of_e2m1`."""
    # 2^(b - 127) 2^-92 is 2^-126 times the bf16 with this field of exponents.
    raise_by = -_FP4_POWER - E2M1_POWER
    fields = minimum_s16((codes & 0xFF00FF) + raise_by * 0x10001, i32(_LARGEST_FIELD * 0x10001))
    return fields << 7


def format_of(name: str, dim: int) -> HeadFormat:
    """The format "bf16", "fp8" or "fp4" for heads of `dim` values.

    Raises:
        ValueError: there is no such format.
    """
    match name:
        case "bf16":
            return HeadFormat(16, dim)
        case "fp8":
            return FP8Format(8, dim, has_scale=True)
        case "fp4":
            return FP4Format(4, dim)
    raise ValueError(f"{name=}: expected 'bf16', 'fp8' or 'fp4'")
