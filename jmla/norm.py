"""Normalisation over the last axis, in f32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*b d"], gain: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """`x / rms(x) * gain`; f32 arithmetic, dtype of `x` out."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return _scaled(wide, gain).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*b d"], gain: Float[Array, " d"], bias: Float[Array, " d"], eps: float
) -> Float[Array, "*b d"]:
    """`(x - mean) / std * gain + bias`; f32 arithmetic, dtype of `x` out."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + bias.shape
    return (_scaled(wide, gain) + bias.astype(jnp.float32).reshape(shape)).astype(x.dtype)


def _scaled(wide: Float[Array, "*b d"], gain: Float[Array, " d"]) -> Float[Array, "*b d"]:
    return wide * gain.astype(jnp.float32).reshape((1,) * (wide.ndim - 1) + gain.shape)
