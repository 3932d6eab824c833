"""Block scales and 8-bit values: the arithmetic that several layouts share.

What is stored must not depend on the backend, nor on what XLA fuses. XLA divides approximately on
GPUs, multiplies by a rounded reciprocal on CPUs, and may drop a narrowing cast that a widening one
follows. So division, rounding and powers of two are spelled out here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Bool, Float, Float8e4m3fn, Float32, Int32, UInt8

from jmla.layouts.base import E4M3_MAX

_F32_MAX = float(np.finfo(np.float32).max)
_E4M3_TINY = 2.0**-6  # the smallest normal number
POW2_FLOOR = -13
"""Smallest exponent of a power-of-two scale: ceil(log2(1e-4))."""


def split_blocks(values: Float[Array, "*tokens n"], size: int) -> Float32[Array, "*tokens b size"]:
    """f32 values in blocks of `size`: [..., n] -> [..., n / size, size]."""
    blocks = values.astype(jnp.float32)
    return blocks.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def finite_amax(blocks: Float32[Array, "*blocks size"]) -> Float32[Array, "*blocks"]:
    """The largest magnitude of each block; NaN is left out, infinity counts as the largest f32."""
    magnitude = jnp.minimum(jnp.abs(blocks), _F32_MAX)
    return jnp.where(jnp.isnan(blocks), 0.0, magnitude).max(-1)


def smallest_exponent(
    amax: Float32[Array, "*blocks"], limit: float, *, floor: int
) -> Int32[Array, "*blocks"]:
    """The smallest e >= `floor` with amax <= limit * 2^e, for finite amax >= 0 and normal limit.

    It is read off the bits: a ceil of a floating-point log2 is off by one next to, and for some
    exponents at, exact powers of two.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    limit_bits = int(np.float32(limit).view(np.int32))
    above = (bits & 0x7FFFFF) > (limit_bits & 0x7FFFFF)
    return jnp.maximum((bits >> 23) - (limit_bits >> 23) + above.astype(jnp.int32), floor)


def exp2(exponent: Int32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
    """Exactly 2^exponent, for exponents from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def e8m0_to_f32(exponent: UInt8[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
    """2^(byte - 127); the byte 255 is NaN. Byte 0 is subnormal, which a backend may flush to 0."""
    bits = exponent.astype(jnp.int32) << 23
    bits = jnp.where(exponent == 0, 0x400000, jnp.where(exponent == 255, 0x7FC00000, bits))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def divide(x: Float32[Array, "*n"], by: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """x / by, correctly rounded wherever the result is a normal number.

    A quotient that is a unit or two off is corrected by its exact remainder. The remainder is exact
    because products of 12-bit halves are, if nothing underflows: hence the lifts.
    """
    x, lift_x = _lifted(x)
    by, lift_by = _lifted(by)
    quotient = x / by
    head, by_head = _upper_half(quotient), _upper_half(by)
    tail, by_tail = quotient - head, by - by_head
    remainder = x - head * by_head - head * by_tail - tail * by_head - tail * by_tail
    corrected = quotient + remainder / by
    # An exact quotient keeps its sign of zero; infinity and NaN have no remainder.
    keep = (remainder == 0) | ~jnp.isfinite(corrected)
    return jnp.where(keep, quotient, corrected) * (lift_by / lift_x)


def _lifted(x: Float32[Array, "*n"]) -> tuple[Float32[Array, "*n"], Float32[Array, "*n"]]:
    lift = jnp.where(jnp.abs(x) < 2.0**-30, jnp.float32(2.0**96), jnp.float32(1))
    return x * lift, lift


def _upper_half(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def to_e4m3(x: Float32[Array, "*n"]) -> Float8e4m3fn[Array, "*n"]:
    """Rounds to nearest even; beyond +-448 saturates (a bare cast gives NaN); NaN stays NaN.

    The rounding is done in f32, so that the result is the same if XLA drops the cast. Adding and
    subtracting a constant would not do: XLA drops that too.
    """
    x = jnp.clip(x, -E4M3_MAX, E4M3_MAX)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    steps = jax.lax.round(x * 2.0**9, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    subnormal = steps * 2.0**-9
    return jnp.where(jnp.abs(x) < _E4M3_TINY, subnormal, normal).astype(jnp.float8_e4m3fn)


def to_bf16(x: Float[Array, "*n"]) -> BFloat16[Array, "*n"]:
    """Rounds f32 to bf16, to nearest even, for good; bf16 stays as it is."""
    if x.dtype == jnp.bfloat16:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def scale_blocks(
    codes: Float8e4m3fn[Array, "*tokens n"], scales: Float32[Array, "*tokens b"], size: int
) -> BFloat16[Array, "*tokens n"]:
    """bf16 of each code times its block's scale, the product in f32."""
    product = split_blocks(codes, size) * scales[..., None]
    return to_bf16(product).reshape(codes.shape)


def is_negative(x: Float32[Array, "*n"]) -> Bool[Array, "*n"]:
    """x < 0, also for subnormal x, which a backend may compare as 0; NaN counts by its sign."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return (bits < 0) & ((bits & 0x7FFFFFFF) != 0)
