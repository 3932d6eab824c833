"""Eight neighbouring values of a row, in one thread: what formats are converted by way of."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Self

from pallas_kernels.device.row_formats import pack_bf16
from pallas_kernels.device.simt import (
    Value,
    branch,
    f32_type,
    i32,
    maximum,
    maximum_s16,
    minimum,
    select,
    shuffle_xor,
)

CHUNK = 8
F32_INFINITY = 0x7F800000
F32_MAX = 0x7F7FFFFF
MAGNITUDE, SIGN = 0x7FFFFFFF, -0x80000000
_BF16_INFINITY = 0x7F80


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The values as they came, bf16 or f32.

    Attributes:
        raw: four pairs of bf16, or eight f32.
    """

    raw: Sequence[Value]

    @property
    def is_f32(self) -> bool:
        """Whether the values are not bf16."""
        return self.raw[0].type == f32_type()

    @classmethod
    def rounded(cls, values: Sequence[Value]) -> Self:
        """Of eight f32, each rounded to bf16."""
        return cls([pack_bf16(values[i], values[i + 1]) for i in range(0, CHUNK, 2)])

    def pairs(self) -> Sequence[Value]:
        """Four pairs of bf16."""
        return type(self).rounded(self.raw).raw if self.is_f32 else self.raw

    def floats(self) -> Sequence[Value]:
        """Eight f32."""
        if self.is_f32:
            return self.raw
        return [x.as_f32() for word in self.raw for x in (word << 16, word & -0x10000)]

    def amax(self) -> tuple[Value, Value]:
        """Bits of the largest magnitude that is not NaN, as f32, and whether there is a NaN."""
        top, has_nan = self._largest()
        return branch(has_nan, [top], lambda: [self._largest_number()])[0], has_nan

    def _largest(self) -> tuple[Value, Value]:
        """The bits that are largest as an integer, of which NaN has more than infinity."""
        if self.is_f32:
            top = functools.reduce(maximum, [x.as_i32() & MAGNITUDE for x in self.raw])
            return top, top > F32_INFINITY
        pairs = functools.reduce(maximum_s16, [word & 0x7FFF7FFF for word in self.raw])
        top = maximum(pairs & 0xFFFF, pairs >> 16)
        return top << 16, top > _BF16_INFINITY

    def _largest_number(self) -> Value:
        bits = [x.as_i32() & MAGNITUDE for x in self.floats()]
        return functools.reduce(maximum, [select(x > F32_INFINITY, i32(0), x) for x in bits])


def over_lanes(value: Value, lanes: int) -> Value:
    """The largest of a group of neighbouring lanes, in each of them."""
    distance = 1
    while distance < lanes:
        value = maximum(value, shuffle_xor(value, distance))
        distance *= 2
    return value


def group_amax(bits: Value, lanes: int) -> Value:
    """Bits of the largest magnitude of a group of lanes; infinity counts as the largest f32."""
    return minimum(over_lanes(bits, lanes), F32_MAX)


def smallest_exponent(amax: Value, limit: int, floor: int) -> Value:
    """The smallest e >= `floor` with amax <= limit * 2^e; both by the bits of an f32."""
    # The mantissa carries into the exponent if it is above that of the limit.
    carry = 0x7FFFFF - (limit & 0x7FFFFF)
    return maximum(((amax + carry) >> 23) - (limit >> 23), i32(floor))


def exp2_bits(exponent: Value) -> Value:
    """The bits of 2^exponent as an f32, from -126 to 127."""
    return (exponent + 127) << 23
