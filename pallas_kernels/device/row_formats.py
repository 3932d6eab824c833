"""How rows of a cache lie in shared memory, and how they become operands of the tensor cores.

A tile is 64 rows, in two parts: no-position values, `nope_bytes` a row, and rotary values,
`rope_bytes` a row. It is read twice. As keys, a thread takes 16 consecutive values of two rows out
of each 64 columns. As values, it takes 8 consecutive columns of four rows, and pairs neighbouring
rows, which transposes them. Rows and columns are numbered so that both come out as fragments of
`wgmma`. The query's columns are permuted alike for all formats, but for which two of a thread's
columns share a word (`RowFormat.partner`).

Chunks of 16 bytes are stored at their number xor `swizzle(row)`, which makes both readings free of
bank conflicts.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.device.memory import (
    load_f16_twice,
    load_global,
    load_shared,
    store_f16,
    store_shared,
)
from pallas_kernels.device.simt import Thread, Value, f32, i32, int_to_float, ptx, select, when

TILE = 64
RANK = 512
ROPE_DIM = 64
COLUMNS = 64  # of a tile that one round of products takes
# 2^-64: rows of smaller scales, and of zeros, count as of this one. Their weights in the sum of
# weights, 2^64, and the others', relative to theirs, stay within f32.
SMALLEST_POWER = (127 - 64) << 23
BIAS = 0
"""Offset, beside the rows, of a logarithm added to each row's logits; -inf masks the row."""


def swizzle[T: (int, Value)](row: T) -> T:
    """What the numbers of a row's chunks are xored with."""
    return (((row >> 1) & 3) ^ ((row & 1) << 1)) << 1 | (row & 1)


@dataclasses.dataclass(frozen=True)
class TileAddress:
    """Where a thread reads a tile; the same in every stage, up to the stage's own address.

    Attributes:
        keys: of the upper of its two rows of keys.
        rope_keys: the same in the rotary part.
        values: of the first and the second of a pair of rows of values.
    """

    keys: Value
    rope_keys: Value
    values: tuple[Value, Value]


class Stage(NamedTuple):
    """Where a stage of rows begins in shared memory.

    Attributes:
        nope: the no-position values.
        rope: the rotary values.
        tokens: what is kept beside the rows.
        value_factors: the thread's factors on values there; see `RowFormat.value_factors_at`.
    """

    nope: Value
    rope: Value
    tokens: Value
    value_factors: Value


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a part of each row lies in global memory.

    Attributes:
        array: the name of the array.
        offset: bytes before the part of the first row.
        stride: bytes from row to row.
        behind: bytes of each row of a page that lie before the part of the page's first row; of
            arrays of pages only.
    """

    array: str
    offset: int
    stride: int
    behind: int = 0


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """One way to store a row.

    Attributes:
        nope: the no-position values.
        nope_bytes: of a row, in shared memory.
        rope: the rotary values.
        rope_bytes: of a row.
        scale: the block scales, or None.
        dtype: "f16" or "bf16", what the tensor cores multiply no-position values in.
        rope_dtype: the same for rotary values.
        scales_are_powers: whether the block scales are powers of two, which one f16 holds; others
            take two, or the logits would be off by as much as a scale's rounding.
        parts: of 64 no-position values.
        scale_columns: how many values have a scale in common.
        stored_bytes: of a row's no-position values where they come from; the rest of `nope_bytes`
            is padding.
        rope_is_value: whether the rotary values are part of the attention value.
        partner: how far apart the two columns of a word of a key fragment are: 1 or 4.
    """

    nope: Part
    nope_bytes: int
    rope: Part
    rope_bytes: int
    scale: Part | None
    dtype: str
    rope_dtype: str
    scales_are_powers: bool = True
    parts: int = 8
    scale_columns: int = 128
    stored_bytes: int | None = None
    rope_is_value: bool = False
    partner: int = 1

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.parts * COLUMNS + ROPE_DIM

    @property
    def block_scales(self) -> bool:
        """Whether a row has scales."""
        return self.scale is not None

    @property
    def scales(self) -> int:
        """How many the no-position values of a row have."""
        return self.parts * COLUMNS // self.scale_columns

    @property
    def rope_is_swizzled(self) -> bool:
        """Whether the chunks of a row of rotary values are xored with the row, by 8."""
        return self.rope_dtype == "bf16"

    @property
    def token_bytes(self) -> int:
        """Bytes kept for a row beside it.

        Its bias; with block scales also its weight, its relative scales in f16, and what f16
        leaves of them.
        """
        if not self.block_scales:
            return 4
        return 8 + (2 if self.scales_are_powers else 4) * self.scales

    def weight_offset(self, rows: int) -> int:
        """Offset, beside `rows` rows, of the factor that takes the bias out of the weights."""
        return 4 * rows

    def relative_scale(self, group: int, rows: int) -> int:
        """Offset of the rows' f16 scales of a group, in units of the row's power of two."""
        return (8 + 2 * group) * rows

    def scale_rest(self, group: int, rows: int) -> int:
        """Offset of what f16 leaves of them, in f16."""
        return (8 + 2 * self.scales + 2 * group) * rows

    def load_scales(self, source: Value, thread: Thread) -> list[Value]:
        """A row's scales, from the address of the first."""
        return load_global(source, "rrrr")

    def store_token(
        self,
        tokens: Value,
        row: Value,
        masked: Value,
        scales: Sequence[Value],
        thread: Thread,
        rows: int,
    ) -> None:
        """Stores what is kept beside a row; lane i of a warp does it for its row i.

        A row's scales are taken as 2^e times numbers below 2, where 2^e is its largest scale's
        power of two. f16 holds the numbers, exactly if the scales are powers of two; e joins the
        logits, so that weights P are relative to what they contribute, and f16 holds these too.

        Args:
            tokens: where they are kept for the stage.
            row: of the stage.
            masked: whether the row does not count.
            scales: from `load_scales`.
            thread: of the warpgroup that calls this.
            rows: of the stage.
        """
        when(
            thread.lane < rows // 4,
            lambda: self._store_token(tokens, row, masked, scales, rows),
        )

    def _store_token(
        self, tokens: Value, row: Value, masked: Value, scales: Sequence[Value], rows: int
    ) -> None:
        if not self.block_scales:
            store_shared(tokens + row * 4, [select(masked, f32(-math.inf), f32(0.0))], BIAS)
            return
        inverse = self._store_power(tokens, row, masked, self.power_of(scales), rows)
        for group, scale in enumerate(scales):
            relative = select(masked, f32(0.0), scale.as_f32() * inverse)
            rounded = store_f16(tokens + row * 2, relative, self.relative_scale(group, rows))
            if not self.scales_are_powers:
                store_f16(tokens + row * 2, relative - rounded, self.scale_rest(group, rows))

    def power_of(self, scales: Sequence[Value]) -> Value:
        """The bits of a row's 2^e, from those of its scales."""
        top = scales[0] & 0x7F800000
        for scale in scales[1:]:
            exponent = scale & 0x7F800000
            top = select(top < exponent, exponent, top)
        return self._power(top)

    def _power(self, top: Value) -> Value:
        """The bits of a row's 2^e, from those of its largest scale's power of two."""
        return select(top < SMALLEST_POWER, i32(SMALLEST_POWER), top)

    def _store_power(
        self, tokens: Value, row: Value, masked: Value, power: Value, rows: int
    ) -> Value:
        """Stores a row's bias and weight; 2^-e."""
        inverse = (i32(254 << 23) - power).as_f32()
        bias = int_to_float((power >> 23) - 127)
        store_shared(tokens + row * 4, [select(masked, f32(-math.inf), bias)], BIAS)
        weight = select(masked, f32(0.0), inverse)
        store_shared(tokens + row * 4, [weight], self.weight_offset(rows))
        return inverse

    def address(self, thread: Thread, row: Value, half: int) -> TileAddress:
        """The thread's places; `half` is which 256 columns of values its warpgroup takes."""
        mix = swizzle(thread.quad)
        if self.dtype == "f16":
            keys = row * self.nope_bytes + ((thread.column ^ mix) << 4)
        else:
            keys = row * self.nope_bytes + (((thread.column << 1) ^ mix) << 4)
        if self.rope_dtype == "bf16":
            rope = row * self.rope_bytes + (((thread.column << 1) ^ (row & 7)) << 4)
        else:
            rope = row * self.rope_bytes + (thread.column << 4)
        places = []
        for parity in range(2):
            token = thread.column * 2 + parity
            mix = swizzle(token)
            if self.dtype == "f16":
                chunk = (((thread.warp & 1) << 2) + (thread.quad >> 1)) ^ mix
                window = (thread.warp >> 1) + (half << 1)
                within = (thread.quad & 1) << 3
            else:
                chunk = thread.quad ^ mix
                window = thread.warp + (half << 2)
                within = i32(0)
            places.append(token * self.nope_bytes + (window << 7) + (chunk << 4) + within)
        return TileAddress(keys, rope, (places[0], places[1]))

    def load_keys(self, tile: Value, address: TileAddress, part: int) -> list[list[Value]]:
        """The words of 16 columns of two rows; the last part is the rotary one, in its own tile."""
        rope = part == self.parts
        place = tile + (address.rope_keys if rope else address.keys)
        row_bytes = self.rope_bytes if rope else self.nope_bytes
        if (self.rope_dtype if rope else self.dtype) == "f16":
            if not rope and part & 1:
                place = place ^ 64
            offset = 0 if rope else (part >> 1) << 7
            return [load_shared(place, "rrrr", offset + 8 * r * row_bytes) for r in range(2)]
        offset = 0 if rope else part << 7
        other = place ^ 16
        return [
            load_shared(place, "rrrr", offset + 8 * r * row_bytes)
            + load_shared(other, "rrrr", offset + 8 * r * row_bytes)
            for r in range(2)
        ]

    def load_key_factors(
        self, tokens: Value, address: TileAddress, row: Value, part: int, rows: int
    ) -> list[Value]:
        """The factors that `key_fragments` takes, of formats with block scales."""
        if part == self.parts:
            offset = self.weight_offset(rows)
            return [load_shared(tokens + row * 4, "r", offset + 32 * r)[0] for r in range(2)]
        place, group = tokens + row * 2, COLUMNS * part // self.scale_columns
        offsets = [self.relative_scale(group, rows)]
        if not self.scales_are_powers:
            offsets.append(self.scale_rest(group, rows))
        return [load_f16_twice(place, offset + 16 * r) for offset in offsets for r in range(2)]

    def key_fragments(
        self, words: Sequence[Sequence[Value]], part: int, factors: Sequence[Value] | None
    ) -> list[Value]:
        """Four fragments of `wgmma`, of four columns of each thread.

        `factors` are those of the two rows: for no-position values two f16, and what they leave
        of the factor if it is no power of two; for rotary values an f32 power of two.
        """
        if (self.rope_dtype if part == self.parts else self.dtype) == "f16":
            pairs = [[half for word in row for half in e4m3_pairs(word)] for row in words]
        else:
            pairs = [list(row) for row in words]
        fragments = [row[k] for k in range(8) for row in pairs]
        if factors is None:
            return fragments
        if part < self.parts and self.scales_are_powers:
            return [multiply_f16(word, factors[i & 1]) for i, word in enumerate(fragments)]
        if part < self.parts:
            return [
                fma_f16(word, factors[i & 1], multiply_f16(word, factors[2 + (i & 1)]))
                for i, word in enumerate(fragments)
            ]
        upper_halves = [permute(factor, factor, "0x3232") for factor in factors]
        return [multiply_bf16(word, upper_halves[i & 1]) for i, word in enumerate(fragments)]

    def load_values(self, tile: Value, address: TileAddress, step: int) -> list[list[Value]]:
        """The words of 8 columns of four rows: of both of a pair, then of the pair 8 rows on."""
        out = "rr" if self.dtype == "f16" else "rrrr"
        return [
            load_shared(
                tile + address.values[parity], out, (16 * step + 8 * below) * self.nope_bytes
            )
            for below in range(2)
            for parity in range(2)
        ]

    def value_factors_at(self, tokens: Value, thread: Thread, half: int, rows: int) -> Value:
        """Where the thread finds the factors of its values, beside the rows of a stage."""
        groups = [self.relative_scale(2 * half + k, rows) for k in range(2)]
        return tokens + select(thread.warp < 2, i32(groups[0]), i32(groups[1])) + thread.column * 4

    def value_fragments(
        self, stage: Stage, address: TileAddress, step: int, half: int, rows: int
    ) -> list[Value]:
        """V^T of 16 keys: a fragment for each tile of 64 columns.

        Their columns are 2i (upper rows) and 2i + 1 (lower rows) of the thread's 8.
        """
        words = self.load_values(stage.nope, address, step)
        factors = self.load_value_factors(stage, address, step) if self.block_scales else None
        columns: list[list[Value]] = []
        for below in range(2):
            pairs = self.pair_rows(words[2 * below], words[2 * below + 1])
            if factors is not None:
                pairs = [multiply_f16(pair, factors[below]) for pair in pairs]
            columns.append(pairs)
        return fragments_of_columns(columns)

    def load_value_factors(self, stage: Stage, address: TileAddress, step: int) -> list[Value]:
        """Two pairs of f16, for the four rows of `load_values`."""
        return [load_shared(stage.value_factors, "r", 32 * step + 16 * k)[0] for k in range(2)]

    def pair_rows(self, first: Sequence[Value], second: Sequence[Value]) -> list[Value]:
        """The words of two rows as eight pairs, of both rows' values of each column."""
        pairs: list[Value] = []
        for a, b in zip(first, second, strict=True):
            if self.dtype == "f16":
                for selector in ("0x5140", "0x7362"):
                    pairs += e4m3_pairs(permute(a, b, selector))
            else:
                pairs += [permute(a, b, "0x5410"), permute(a, b, "0x7632")]
        return pairs


def fragments_of_columns(columns: Sequence[Sequence[Value]]) -> list[Value]:
    """Four fragments from eight pairs of two rows, and from those of the rows 8 below."""
    return [columns[below][2 * i + row] for i in range(4) for below in range(2) for row in range(2)]


def e4m3_pairs(word: Value) -> list[Value]:
    """Four e4m3 codes as two words of two f16, exactly; NaN codes are NaN."""
    return ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
        "cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        word,
        out="rr",
        pure=True,
    )


def permute(a: Value, b: Value, selector: str | Value) -> Value:
    """Four bytes chosen from eight."""
    if isinstance(selector, Value):
        return ptx("prmt.b32 $0, $1, $2, $3;", a, b, selector, out="r", pure=True)[0]
    return ptx(f"prmt.b32 $0, $1, $2, {selector};", a, b, out="r", pure=True)[0]


def multiply_f16(a: Value, b: Value) -> Value:
    """The products of two pairs of f16."""
    return ptx("mul.rn.f16x2 $0, $1, $2;", a, b, out="r", pure=True)[0]


def fma_f16(a: Value, b: Value, c: Value) -> Value:
    """a * b + c of two triples of f16, each rounded once."""
    return ptx("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c, out="r", pure=True)[0]


def multiply_bf16(a: Value, b: Value) -> Value:
    """The products of two pairs of bf16."""
    return ptx("mul.rn.bf16x2 $0, $1, $2;", a, b, out="r", pure=True)[0]


def pack_f16(low: Value, high: Value) -> Value:
    """Two floats rounded to f16."""
    return ptx("cvt.rn.f16x2.f32 $0, $2, $1;", low, high, out="r", pure=True)[0]


def pack_bf16(low: Value, high: Value) -> Value:
    """Two floats rounded to bf16."""
    return ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high, out="r", pure=True)[0]
