"""e2m1 codes, two to a byte, with a power-of-two scale byte per 16 values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.cache_codec.chunk import (
    CHUNK,
    F32_INFINITY,
    MAGNITUDE,
    SIGN,
    Chunk,
    exp2_bits,
    group_amax,
    over_lanes,
    smallest_exponent,
)
from pallas_kernels.cache_codec.parts import Part
from pallas_kernels.cache_codec.places import Field, Row
from pallas_kernels.device.memory import (
    load_global,
    load_global_byte,
    store_global,
    store_global_byte,
)
from pallas_kernels.device.row_formats import multiply_bf16, permute
from pallas_kernels.device.simt import (
    Value,
    block_thread,
    bool_to_int,
    branch,
    f32,
    fma,
    i32,
    minimum_s16,
    ptx,
    select,
    when,
)

_BLOCK = 16
_LIMIT = 0x40C00000  # 6
_FLOOR = -33
_NAN_BYTE = 255
# The numbers of e2m1 are the smallest of f16, times 2^-14: codes are the bits from the ninth on.
_F16_POWER = 2.0**-14
_F16_LIMIT = 0x0E000E00  # 6 * 2^-14
_F16_HALF_CODE = 0x01000100
# Likewise those of bf16, times 2^-126, from the sixth bit on.
_BF16_POWER = 0x7E807E80  # 2^126
_BF16_NAN, _BF16_SUBNORMAL_POWER = 0x7FC0, 0x0040


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2M1Part(Part):
    """What is stored of a chunk is a word of codes and the scale byte.

    Attributes:
        codes: where they are.
        scale: where the bytes are, which each stand for 2^(b - 127).
    """

    codes: Field
    scale: Field

    @property
    def lanes(self) -> int:
        """See `Part.lanes`."""
        return _BLOCK // CHUNK

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`."""
        (codes,) = load_global(row.address(self.codes) + chunk.wide() * (CHUNK // 2), "r")
        return [codes, load_global_byte(row.address(self.scale) + (chunk >> 1).wide())]

    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """See `Part.decode`."""
        codes, byte = stored
        power = select(byte.equals(0), i32(_BF16_SUBNORMAL_POWER), byte << 7)
        power = select(byte.equals(_NAN_BYTE), i32(_BF16_NAN), power) * 0x10001
        # Codes i and i + 4 of each word.
        split = []
        for i in range(4):
            shifted = codes >> (4 * i)
            bits = ((shifted & 0x70007) << 6) | ((shifted & 0x80008) << 12)
            split.append(multiply_bf16(multiply_bf16(bits, i32(_BF16_POWER)), power))
        return Chunk(
            [
                permute(split[i], split[i + 1], selector)
                for selector in ("0x5410", "0x7632")
                for i in (0, 2)
            ]
        )

    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """See `Part.encode`."""
        bits, has_nan = values.amax()
        amax = group_amax(bits, self.lanes)
        exponent = smallest_exponent(amax, _LIMIT, _FLOOR)
        factor = exp2_bits(i32(0) - exponent).as_f32() * _F16_POWER
        floats = list(values.floats())
        floats = branch(has_nan, floats, lambda: [_without_nan(x) for x in floats])
        # The sum makes -0.0 to 0.0, but leaves the sign of what underflows.
        scaled = [fma(x, factor, f32(0.0)) for x in floats]
        halves = [_e2m1_pair(scaled[i], scaled[i + 1]) for i in range(0, CHUNK, 2)]
        evens_and_odds = [halves[i] | (halves[i + 1] << 8) for i in (0, 2)]
        bytes_of = [word | (word >> 12) for word in evens_and_odds]
        codes = permute(bytes_of[0], bytes_of[1], "0x5410")
        block_has_nan = over_lanes(bool_to_int(has_nan), self.lanes) > 0
        return [codes, select(block_has_nan, i32(_NAN_BYTE), exponent + 127)]

    def store(self, row: Row, chunk: Value, stored: Sequence[Value]) -> None:
        """See `Part.store`; the first lane of a block stores the scale byte."""
        codes, byte = stored
        store_global(row.address(self.codes) + chunk.wide() * (CHUNK // 2), [codes])
        first = (block_thread() & 1).equals(0)
        when(
            first,
            lambda: store_global_byte(row.address(self.scale) + (chunk >> 1).wide(), byte),
        )

    def adopt(
        self, other: Part, stored: Sequence[Value], constants: Sequence[Value]
    ) -> list[Value] | None:
        """See `Part.adopt`."""
        return list(stored) if isinstance(other, E2M1Part) else None


def _without_nan(x: Value) -> Value:
    """A NaN becomes the smallest number of its sign, whose code is zero."""
    bits = x.as_i32()
    return select((bits & MAGNITUDE) > F32_INFINITY, (bits & SIGN) | 1, bits).as_f32()


def _e2m1_pair(first: Value, second: Value) -> Value:
    """Two codes, at bits 0 and 16; the middle between two goes to the larger magnitude."""
    # Rounded to zero: what is below the middle stays there.
    pair = ptx("cvt.rz.f16x2.f32 $0, $2, $1;", first, second, out="r", pure=True)[0]
    magnitude = minimum_s16(pair & 0x7FFF7FFF, i32(_F16_LIMIT)) + _F16_HALF_CODE
    return ((magnitude >> 9) & 0x70007) | ((pair >> 12) & 0x80008)
