"""Correctly rounded quotients of many values by one, without a division for each."""

import dataclasses
from collections.abc import Sequence
from typing import Self

from pallas_kernels.cache_codec.chunk import F32_INFINITY, MAGNITUDE, SIGN, Chunk
from pallas_kernels.device.row_formats import permute
from pallas_kernels.device.simt import (
    Value,
    branch,
    choose_bits,
    divide,
    f32,
    fma,
    i32,
    int_to_float,
    ptx,
    select,
)

_ONE = 0x3F800000
_SIGNS = -0x7F7F7F80  # of four codes
_MANTISSA, _EXPONENT = 0x7FFFFF, 0xFF << 23
_LARGEST_POWER, _SUBNORMAL_POWER = 254 << 23, 1 << 22  # 2^127 and 2^-127
# Beyond 448 times the divisor everything saturates; the divisor's mantissa is below 2.
_CLAMP = 1024.0
# Scales whose reciprocals are normal, and whose remainders neither underflow nor overflow.
_SMALLEST_ORDINARY, _LARGEST_ORDINARY = (127 - 92) << 23, (127 + 116) << 23


@dataclasses.dataclass(frozen=True)
class Divisor:
    """A divisor as its powers of two and a mantissa.

    x / (m * 2^e) is found as the quotient of x * 2^-e by m, from 1 / m, and from remainders that
    are exact because a fused multiply-add does not round its product.

    Attributes:
        power: 2^-e, with the divisor's sign.
        mantissa: m, below 2; at least 1, but for a subnormal divisor.
        reciprocal: 1 / m, correctly rounded.
        negative: -m.
    """

    power: Value
    mantissa: Value
    reciprocal: Value
    negative: Value

    @classmethod
    def of_scale(cls, bits: Value, vanishes: Value) -> Self:
        """By a positive, normal scale below 2^127, or by infinity where it vanishes."""
        power = select(vanishes, i32(0), i32(_LARGEST_POWER) - (bits & _EXPONENT))
        return cls._of(power, (bits & _MANTISSA) | _ONE)

    @classmethod
    def of_any(cls, scale: Value) -> Self:
        """By any f32, also zero, infinity, NaN and subnormal numbers."""
        bits = scale.as_i32()
        sign, magnitude = bits & SIGN, bits & MAGNITUDE
        exponent = magnitude & _EXPONENT
        power = i32(_LARGEST_POWER) - exponent
        power = select(exponent.equals(_LARGEST_POWER), i32(_SUBNORMAL_POWER), power)
        mantissa = (magnitude & _MANTISSA) | _ONE
        # 2^-e ends at 2^127: what is left of a subnormal number stays in its mantissa.
        subnormal = (int_to_float(magnitude) * 2.0**-22).as_i32()
        mantissa = select(exponent.equals(0), subnormal, mantissa)
        # x / 0 and x / infinity are x times infinity and zero; NaN stays NaN.
        power = select(magnitude.equals(0), i32(F32_INFINITY), power)
        mantissa = select(magnitude.equals(0), i32(_ONE), mantissa)
        power = select(magnitude.equals(F32_INFINITY), i32(0), power)
        power = select(magnitude > F32_INFINITY, magnitude, power)
        return cls._of(power | sign, mantissa)

    @classmethod
    def _of(cls, power: Value, mantissa: Value) -> Self:
        value = mantissa.as_f32()
        reciprocal = divide(f32(1.0), value)
        return cls(power.as_f32(), value, reciprocal, (mantissa | SIGN).as_f32())

    def quotient(self, x: Value) -> Value:
        """x by the divisor, correctly rounded up to 448 of it and at least 448 beyond."""
        x = _clamped(x * self.power)
        q = x * self.reciprocal
        # The first step leaves an error of at most one unit, from which the second one is exact.
        for _ in range(2):
            q = fma(fma(q, self.negative, x), self.reciprocal, q)
        # A zero quotient loses its sign to the sum.
        return choose_bits(x.as_i32(), q.as_i32(), SIGN).as_f32()


@dataclasses.dataclass(frozen=True)
class TensorDivisor:
    """The scale of a tensor, by which values are divided on their way to e4m3.

    A quotient of a bf16 by most scales takes one remainder. What a second one could change is how
    quotients round to f32 that lie, but for 2^-22 units, half a unit from the middle of two codes:
    x = (middle + half a unit) * scale. A middle has five bits and x eight, which no such scale
    gives but one whose mantissa is all ones (by the middle below the smallest code).

    Attributes:
        scale: the divisor.
        reciprocal: 1 / scale, correctly rounded but where the scale is rare.
        rare: whether it is another.
    """

    scale: Value
    reciprocal: Value
    rare: Value

    @classmethod
    def of(cls, scale: Value) -> Self:
        """By any f32."""
        bits = scale.as_i32()
        above = (bits & MAGNITUDE) - _SMALLEST_ORDINARY
        rare = above.at_least(_LARGEST_ORDINARY - _SMALLEST_ORDINARY)
        rare = rare | (bits & _MANTISSA).equals(_MANTISSA)
        return cls(scale, divide(f32(1.0), scale), rare)

    def quotients(self, values: Chunk) -> list[Value]:
        """f32 that have the codes of the quotients, but for the sign of zeros; see `signed`."""
        floats = list(values.floats())

        def exact() -> list[Value]:
            divisor = Divisor.of_any(self.scale)
            return [divisor.quotient(x) for x in floats]

        if values.is_f32:
            return exact()
        negative = (self.scale.as_i32() ^ SIGN).as_f32()

        def near(x: Value) -> Value:
            q = _clamped(x * self.reciprocal)
            return fma(fma(q, negative, x), self.reciprocal, q)

        return branch(self.rare, [near(x) for x in floats], exact)

    def signed(self, codes: Sequence[Value], values: Chunk) -> list[Value]:
        """The words of codes with the signs of the quotients: a zero has lost it to a sum."""
        if values.is_f32:
            return list(codes)
        flipped = select(self.scale.as_i32() < 0, i32(_SIGNS), i32(0))
        upper_bytes = [
            permute(values.raw[i], values.raw[i + 1], "0x7531") for i in range(0, len(codes) * 2, 2)
        ]
        return [
            code | ((word & _SIGNS) ^ flipped)
            for code, word in zip(codes, upper_bytes, strict=True)
        ]


def _clamped(x: Value) -> Value:
    text = "min.NaN.xorsign.abs.f32 $0, $1, $2;"
    return ptx(text, x, f32(_CLAMP), out="f", pure=True)[0]
