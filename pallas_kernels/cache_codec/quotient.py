"""Correctly rounded quotients of many values by one, without a division for each."""

import dataclasses
from typing import Self

from pallas_kernels.cache_codec.chunk import F32_INFINITY, MAGNITUDE, SIGN
from pallas_kernels.device.simt import (
    Value,
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
_MANTISSA, _EXPONENT = 0x7FFFFF, 0xFF << 23
_LARGEST_POWER, _SUBNORMAL_POWER = 254 << 23, 1 << 22  # 2^127 and 2^-127
# Beyond 448 times the divisor everything saturates; the divisor's mantissa is below 2.
_CLAMP = 1024.0


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


def _clamped(x: Value) -> Value:
    text = "min.NaN.xorsign.abs.f32 $0, $1, $2;"
    return ptx(text, x, f32(_CLAMP), out="f", pure=True)[0]
