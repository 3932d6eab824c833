"""FP4 rows: e2m1 pairs and a power-of-two scale byte per 16 values, rotary values included.

A thread takes 8 bytes of two rows as keys, and 4 bytes of four rows as values. Both become pairs of
f16 by the same few instructions: the word of a key pairs columns that are four apart (which the
query's columns follow), the word of values pairs two rows.

e2m1 is the upper end of f16: its bits in the right places are the number times 2^-14, of which 0.5
is a subnormal number that products keep. So a scale costs nothing: its power, relative to the row's
and times 2^14, is what the pairs are multiplied by.
The exponent alone is kept, as the upper byte of an f16, whose lower byte is zero.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from pallas_kernels.device.memory import load_global, load_shared, store_shared
from pallas_kernels.device.row_formats import (
    BIAS,
    RowFormat,
    Stage,
    TileAddress,
    multiply_f16,
    permute,
    swizzle,
)
from pallas_kernels.device.simt import (
    Thread,
    Value,
    choose_bits,
    f32,
    i32,
    maximum_s16,
    minimum,
    ptx,
    select,
    shuffle_xor,
    when,
)

SCALE_BYTES = 36
NAN_BYTE = 255
# A scale byte is kept as b - top + TOP_EXPONENT, where top is the row's largest: 2^14 for that one.
# At 28 below it a value is less than half of the smallest f16.
TOP_EXPONENT = 15 + 14
# In `permute`, a byte of zeros in place of a byte that is not negative.
ZERO = 0x8


@dataclasses.dataclass(frozen=True)
class FP4Address(TileAddress):
    """Where a thread reads a tile.

    Attributes:
        key_selector: `permute`'s, from the four scale bytes of 64 columns to a pair of the one of
            the thread's 16 columns.
        value_selector: from those of two rows to the pair of its 8 columns.
    """

    key_selector: Value
    value_selector: Value


@dataclasses.dataclass(frozen=True)
class FP4Format(RowFormat):
    """See the module; `scale` are bytes that each stand for 2^(b - 127)."""

    @property
    def token_bytes(self) -> int:
        """Bytes kept for a row beside it: its bias, its weight, its relative scales."""
        return 8 + SCALE_BYTES

    def load_scales(self, source: Value, thread: Thread) -> list[Value]:
        """Half of a row's scales, and four bytes: the upper half in the upper 16 lanes."""
        half = source + (thread.lane & 16).wide()
        return [load_global(half, "r", 4 * k)[0] for k in range(5)]

    def store_token(
        self,
        tokens: Value,
        row: Value,
        masked: Value,
        scales: Sequence[Value],
        thread: Thread,
        rows: int,
    ) -> None:
        """See `RowFormat.store_token`; lanes i and i + 16 of a warp do it for its row i."""
        scales = [select(masked, i32(0), word) for word in scales]
        pairs = [pair for word in scales for pair in (word & 0xFF00FF, (word >> 8) & 0xFF00FF)]
        joined = functools.reduce(maximum_s16, pairs)
        joined = maximum_s16(joined, joined >> 16) & 0xFF
        top = maximum_s16(joined, shuffle_xor(joined, 16))
        power = self._power(minimum(top, 253) << 23)
        shift = ((i32(TOP_EXPONENT) - (power >> 23)) & 0xFFFF) * 0x10001
        relative = [maximum_s16(_add(pair, shift), i32(0)) for pair in pairs]
        place = tokens + row * SCALE_BYTES + (thread.lane & 16)
        for k in range(5):
            word = (relative[2 * k] << 2) | (relative[2 * k + 1] << 10)
            store_shared(place, [word], self._scale_offset(rows) + 4 * k)

        def store() -> None:
            self._store_power(tokens, row, masked, power, rows)
            # A block with a NaN is NaN throughout, and makes NaN of all that attends to its row.
            when(
                top.equals(NAN_BYTE),
                lambda: store_shared(tokens + row * 4, [f32(math.nan)], BIAS),
            )

        when(thread.lane < rows // 4, store)

    def _scale_offset(self, rows: int) -> int:
        """Offset of the scales beside `rows` rows."""
        return 8 * rows

    def address(self, thread: Thread, row: Value, half: int) -> FP4Address:
        """See `RowFormat.address`."""
        mix = swizzle(thread.quad)
        keys = row * self.nope_bytes + (((thread.column >> 1) ^ mix) << 4)
        rope = row * self.rope_bytes + (thread.column << 3)
        places = []
        for parity in range(2):
            token = thread.column * 2 + parity
            chunk = ((thread.warp << 1) + (thread.quad >> 2)) ^ swizzle(token)
            within = (chunk << 4) + ((thread.quad & 3) << 2)
            places.append(token * self.nope_bytes + (half << 7) + within)
        zeros = ZERO | ZERO << 8
        return FP4Address(
            keys=keys + ((thread.column & 1) << 3),
            rope_keys=rope,
            values=(places[0], places[1]),
            key_selector=thread.column * 0x1010 + zeros,
            value_selector=(thread.quad >> 1) * 0x1010 + (zeros | 4 << 12),
        )

    def load_keys(self, tile: Value, address: TileAddress, part: int) -> list[list[Value]]:
        """See `RowFormat.load_keys`: two words of each row."""
        if part == self.parts:
            place, offset, row_bytes = tile + address.rope_keys, 0, self.rope_bytes
        else:
            place, offset, row_bytes = tile + address.keys, (part >> 2) << 7, self.nope_bytes
            if part & 3:
                place = place ^ ((part & 3) << 5)
        return [load_shared(place, "rr", offset + 8 * r * row_bytes) for r in range(2)]

    def load_key_factors(
        self, tokens: Value, address: TileAddress, row: Value, part: int, rows: int
    ) -> list[Value]:
        """The factors of two rows, each twice in a word."""
        assert isinstance(address, FP4Address)
        place, offset = tokens + row * SCALE_BYTES, self._scale_offset(rows) + 4 * part
        words = [load_shared(place, "r", offset + 8 * SCALE_BYTES * r)[0] for r in range(2)]
        return [permute(word, word, address.key_selector) for word in words]

    def key_fragments(
        self, words: Sequence[Sequence[Value]], part: int, factors: Sequence[Value] | None
    ) -> list[Value]:
        """See `RowFormat.key_fragments`; `factors` are those of `load_key_factors`."""
        assert factors is not None
        pairs = [[pair for word in row for pair in e2m1_pairs(word)] for row in words]
        return [
            multiply_f16(row[k], factor)
            for k in range(8)
            for row, factor in zip(pairs, factors, strict=True)
        ]

    def load_values(self, tile: Value, address: TileAddress, step: int) -> list[list[Value]]:
        """See `RowFormat.load_values`: a word of each row."""
        return [
            load_shared(
                tile + address.values[parity], "r", (16 * step + 8 * below) * self.nope_bytes
            )
            for below in range(2)
            for parity in range(2)
        ]

    def value_factors_at(self, tokens: Value, thread: Thread, half: int, rows: int) -> Value:
        """See `RowFormat.value_factors_at`: of the first of the thread's rows."""
        place = tokens + (thread.warp * 4 + thread.column * (2 * SCALE_BYTES))
        return place + (self._scale_offset(rows) + 16 * half)

    def load_value_factors(self, stage: Stage, address: TileAddress, step: int) -> list[Value]:
        """Two pairs of f16, for the four rows of `load_values`."""
        assert isinstance(address, FP4Address)
        words = [
            load_shared(stage.value_factors, "r", (16 * step + 8 * below + parity) * SCALE_BYTES)[0]
            for below in range(2)
            for parity in range(2)
        ]
        return [permute(words[i], words[i + 1], address.value_selector) for i in (0, 2)]

    def pair_rows(self, first: Sequence[Value], second: Sequence[Value]) -> list[Value]:
        """See `RowFormat.pair_rows`; the pairs are 2^-14 of the values."""
        halves = [permute(first[0], second[0], selector) for selector in ("0x5410", "0x7632")]
        return [pair for word in halves for pair in e2m1_pairs(word)]


def e2m1_pairs(word: Value) -> list[Value]:
    """Eight e2m1 codes as four pairs of f16, of the codes i and i + 4: 2^-14 of their values."""
    pairs = []
    # The codes in even and in odd places, each as the upper byte of an f16 in its own byte.
    for magnitude, sign in ((word << 1, word << 4), (word >> 3, word)):
        both = choose_bits(sign, magnitude, _signed(0x80808080))
        pairs.append([(both << 8) & _signed(0x8E008E00), both & _signed(0x8E008E00)])
    return [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]]


def _signed(word: int) -> int:
    return word - (1 << 32)


def _add(a: Value, b: Value) -> Value:
    """The sums of two pairs of 16-bit integers."""
    return ptx("add.u16x2 $0, $1, $2;", a, b, out="r", pure=True)[0]
