"""How rows of a cache lie in shared memory, and how they become operands of the tensor cores.

A tile is 64 rows, in two parts: no-position values, `nope_bytes` a row, and rotary values,
`rope_bytes` a row. It is read twice. As keys, a thread takes 16 consecutive values of two rows out
of each 64 columns. As values, it takes 8 consecutive columns of four rows, and pairs neighbouring
rows, which transposes them. Rows and columns are numbered so that both come out as fragments of
`wgmma`, with the same permutation of the query's columns for all formats.

Chunks of 16 bytes are stored at their number xor `swizzle(row)`, which makes both readings free of
bank conflicts.
"""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.device.memory import load_shared
from pallas_kernels.device.simt import Thread, Value, i32, ptx

TILE = 64
RANK = 512
ROPE_DIM = 64
COLUMNS = 64  # of a tile that one round of products takes
PARTS = RANK // COLUMNS


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


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a part of each row lies in global memory.

    Attributes:
        array: the name of the array.
        offset: bytes before the part of the first row.
        stride: bytes from row to row.
    """

    array: str
    offset: int
    stride: int


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """One way to store a row.

    Attributes:
        nope: the no-position values.
        nope_bytes: of a row.
        rope: the rotary values.
        rope_bytes: of a row.
        scale: the f32 block scales, one per 128 no-position values, or None.
        dtype: "f16" or "bf16", what the tensor cores multiply no-position values in.
        rope_dtype: the same for rotary values.
        scales_are_powers: whether the block scales are powers of two, which one f16 holds; others
            take two, or the logits would be off by as much as a scale's rounding.
    """

    nope: Part
    nope_bytes: int
    rope: Part
    rope_bytes: int
    scale: Part | None
    dtype: str
    rope_dtype: str
    scales_are_powers: bool = True

    @property
    def block_scales(self) -> bool:
        """Whether a row has a scale per 128 values."""
        return self.scale is not None

    @property
    def rope_is_swizzled(self) -> bool:
        """Whether the chunks of a row of rotary values are xored with the row, by 8."""
        return self.rope_dtype == "bf16"

    @property
    def token_bytes(self) -> int:
        """Bytes kept for a row beside it.

        Its bias; with block scales also its weight, its four relative scales in f16, and what
        f16 leaves of them.
        """
        if not self.block_scales:
            return 4
        return 16 if self.scales_are_powers else 24

    def address(self, thread: Thread, row: Value, half: Value) -> TileAddress:
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
                window = (half << 1) + (thread.warp >> 1)
                within = (thread.quad & 1) << 3
            else:
                chunk = thread.quad ^ mix
                window = (half << 2) + thread.warp
                within = i32(0)
            places.append(token * self.nope_bytes + (window << 7) + (chunk << 4) + within)
        return TileAddress(keys, rope, (places[0], places[1]))

    def load_keys(self, tile: Value, address: TileAddress, part: int) -> list[list[Value]]:
        """The words of 16 columns of two rows; part 8 is the rotary one, in its own tile."""
        rope = part == PARTS
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

    def key_fragments(
        self, words: Sequence[Sequence[Value]], part: int, factors: Sequence[Value] | None
    ) -> list[Value]:
        """Four fragments of `wgmma`, of four columns of each thread.

        `factors` are those of the two rows: for no-position values two f16, and what they leave
        of the factor if it is no power of two; for rotary values an f32 power of two.
        """
        if (self.rope_dtype if part == PARTS else self.dtype) == "f16":
            pairs = [[half for word in row for half in e4m3_pairs(word)] for row in words]
        else:
            pairs = [list(row) for row in words]
        fragments = [row[k] for k in range(8) for row in pairs]
        if factors is None:
            return fragments
        if part < PARTS and self.scales_are_powers:
            return [multiply_f16(word, factors[i & 1]) for i, word in enumerate(fragments)]
        if part < PARTS:
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

    def value_fragments(
        self, words: Sequence[Sequence[Value]], factors: Sequence[Value] | None
    ) -> list[Value]:
        """Four fragments, of columns 2i (upper rows) and 2i + 1 (lower rows) of the thread's 8.

        `factors` are two pairs of f16, for the four rows.
        """
        columns: list[list[Value]] = []
        for below in range(2):
            first, second = words[2 * below], words[2 * below + 1]
            pairs: list[Value] = []
            for a, b in zip(first, second, strict=True):
                if self.dtype == "f16":
                    for selector in ("0x5140", "0x7362"):
                        pairs += e4m3_pairs(permute(a, b, selector))
                else:
                    pairs += [permute(a, b, "0x5410"), permute(a, b, "0x7632")]
            if factors is not None:
                pairs = [multiply_f16(pair, factors[below]) for pair in pairs]
            columns.append(pairs)
        return [
            columns[below][2 * i + row] for i in range(4) for below in range(2) for row in range(2)
        ]


def e4m3_pairs(word: Value) -> list[Value]:
    """Four e4m3 codes as two words of two f16, exactly; NaN codes are NaN."""
    return ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
        "cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        word,
        out="rr",
        pure=True,
    )


def permute(a: Value, b: Value, selector: str) -> Value:
    """Four bytes chosen from eight."""
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
