"""DeepSeek-V4 rows: 448 e4m3 values with a scale byte per 64, then 64 bf16 rotary values.

A scale is a power of two. The whole row is the attention value, so the rotary values are needed
until the second product: as keys they are multiplied in bf16 like those of other formats, as values
in f16, like the others of their row, relative to its 2^e.

So 2^e must suit both. e4m3 times 2^-15 is still exact in f16, and rotary values are wanted within
the range of f16. 2^e is 2^7 times the largest scale, or 1 if that is more. Then a rotary value
overflows beyond 2^16 times that and is exact down to 2^-17 of it. All e4m3 values of a row are
exact whose scales are at least 2^-13 and do not differ by more than 2^8.
"""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.device.memory import load_global, load_global_byte, load_shared
from pallas_kernels.device.row_formats import (
    RowFormat,
    Stage,
    TileAddress,
    fragments_of_columns,
    pack_f16,
)
from pallas_kernels.device.simt import Thread, Value, either, i32, minimum, select

SCALES = 7
NAN_BYTE, NAN_BITS = 255, 0x7FC00000
HEADROOM = 7  # how many powers 2^e is above the largest scale
LARGEST_POWER, LEAST_POWER = 253 << 23, 127 << 23


@dataclasses.dataclass(frozen=True)
class V4Address(TileAddress):
    """Where a thread reads a tile.

    Attributes:
        rope_values: of the first and the second of a pair of rows, in the rotary part.
        weights: of both, beside the rows, without their offset there.
        reads_rope: whether the thread's columns are rotary ones, in the half that has them.
    """

    rope_values: tuple[Value, Value]
    weights: Value
    reads_rope: Value


@dataclasses.dataclass(frozen=True)
class V4Format(RowFormat):
    """See the module; `scale` are bytes that each stand for 2^(b - 127)."""

    def load_scales(self, source: Value, thread: Thread) -> list[Value]:
        """A row's scale bytes in two words."""
        if self.scale is not None and self.scale.stride % 8 == 0:
            return load_global(source, "rr")
        codes = [load_global_byte(source, i) for i in range(SCALES)]
        words = []
        for word in (codes[:4], codes[4:]):
            joined = word[0]
            for i, code in enumerate(word[1:], 1):
                joined = joined | (code << 8 * i)
            words.append(joined)
        return words

    def store_token(
        self,
        tokens: Value,
        row: Value,
        masked: Value,
        scales: Sequence[Value],
        thread: Thread,
        rows: int,
    ) -> None:
        """See `RowFormat.store_token`."""
        codes = [(scales[i // 4] >> 8 * (i % 4)) & 0xFF for i in range(SCALES)]
        floats = [select(code.equals(NAN_BYTE), i32(NAN_BITS), code << 23) for code in codes]
        super().store_token(tokens, row, masked, floats, thread, rows)

    def _power(self, top: Value) -> Value:
        raised = minimum(top, LARGEST_POWER - (HEADROOM << 23)) + (HEADROOM << 23)
        return select(raised < LEAST_POWER, i32(LEAST_POWER), raised)

    def address(self, thread: Thread, row: Value, half: int) -> V4Address:
        """See `RowFormat.address`."""
        base = super().address(thread, row, half)
        tokens = [thread.column * 2 + parity for parity in range(2)]
        places = [token * self.rope_bytes + ((thread.quad ^ token) << 4) for token in tokens]
        return V4Address(
            keys=base.keys,
            rope_keys=base.rope_keys,
            values=base.values,
            rope_values=(places[0], places[1]),
            weights=thread.column << 3,
            reads_rope=thread.warp.equals(3),
        )

    def value_factors_at(self, tokens: Value, thread: Thread, half: int, rows: int) -> Value:
        """See `RowFormat.value_factors_at`: a warp has the 64 columns of one scale."""
        group = thread.warp * (2 * rows) + self.relative_scale(4 * half, rows)
        return tokens + group + thread.column * 4

    def value_fragments(
        self, stage: Stage, address: TileAddress, step: int, half: int, rows: int
    ) -> list[Value]:
        """See `RowFormat.value_fragments`; the last 64 columns are the rotary values."""
        assert isinstance(address, V4Address)
        nope = super().value_fragments
        if half == 0:
            return nope(stage, address, step, half, rows)
        return either(
            address.reads_rope,
            16,
            lambda: self._rope_fragments(stage, address, step, rows),
            lambda: nope(stage, address, step, half, rows),
        )

    def _rope_fragments(
        self, stage: Stage, address: V4Address, step: int, rows: int
    ) -> list[Value]:
        columns = []
        for first_row in (16 * step, 16 * step + 8):
            words = [
                load_shared(stage.rope + place, "rrrr", first_row * self.rope_bytes)
                for place in address.rope_values
            ]
            offset = self.weight_offset(rows) + 4 * first_row
            factors = load_shared(stage.tokens + address.weights, "ff", offset)
            pairs = []
            for a, b in zip(*words, strict=True):
                low, high = ((a << 16, b << 16), (a & -65536, b & -65536))
                for pair in (low, high):
                    scaled = [x.as_f32() * y for x, y in zip(pair, factors, strict=True)]
                    pairs.append(pack_f16(scaled[0], scaled[1]))
            columns.append(pairs)
        return fragments_of_columns(columns)
