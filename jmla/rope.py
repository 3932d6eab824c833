"""Rotary position embedding, with YaRN's context extension."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary frequencies.

    YaRN (Peng et al., 2023) is on when `factor` > 1: fast pairs keep their frequency, slow pairs
    are slowed by `factor`, with a linear ramp between the pairs that turn `beta_fast` and
    `beta_slow` times within the original context.

    Attributes:
        theta: base of the geometric frequency sequence.
        factor: context extension; 1 means plain RoPE.
        original_context: context length before the extension, in tokens.
        beta_fast: turns above which a pair is left as it is.
        beta_slow: turns below which a pair is slowed by the full factor.
        mscale_all_dim: weight of the attention factor; DeepSeek-V3.2 has 1.0.
    """

    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 1.0

    @property
    def attention_factor(self) -> float:
        """What YaRN multiplies queries and keys by, each; 1 without extension."""
        if self.factor <= 1.0:
            return 1.0
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of each of the `dim // 2` pairs, f32."""
        plain = self.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        if self.factor <= 1.0:
            return plain.astype(np.float32)

        def pair_turning(turns: float) -> float:
            wavelength = self.original_context / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(self.theta))

        low = max(math.floor(pair_turning(self.beta_fast)), 0)
        high = min(math.ceil(pair_turning(self.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        return (plain / self.factor * ramp + plain * (1.0 - ramp)).astype(np.float32)


def apply_rope(
    x: Float[Array, "tokens *heads dim"],
    positions: Int[Array, " tokens"],
    rope: Rope,
    *,
    interleaved: bool,
) -> Float[Array, "tokens *heads dim"]:
    """Rotate all of `x`'s last axis by its token's position; f32 arithmetic, dtype of `x` out.

    Args:
        x: `[tokens, ..., dim]`, `dim` even.
        positions: int32 `[tokens]`, each token's place in its request.
        rope: the frequencies.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... as in MLA; otherwise (i, i + dim/2),
            as in the indexer of DeepSeek-V3.2.
    """
    return rotate(x, *cos_sin(positions, rope, x.shape[-1]), interleaved=interleaved)


def cos_sin(
    positions: Int[Array, " tokens"], rope: Rope, dim: int
) -> tuple[Float32[Array, "tokens pairs"], Float32[Array, "tokens pairs"]]:
    """Cosine and sine of the angle of each of the `dim // 2` pairs, f32 `[tokens, dim // 2]`."""
    angle = positions.astype(jnp.float32)[:, None] * rope.frequencies(dim)[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "tokens *heads dim"],
    cos: Float32[Array, "tokens pairs"],
    sin: Float32[Array, "tokens pairs"],
    *,
    interleaved: bool,
) -> Float[Array, "tokens *heads dim"]:
    """`apply_rope` by cosines and sines."""
    by_pair = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1] // 2)
    cos, sin = cos.reshape(by_pair), sin.reshape(by_pair)
    wide = x.astype(jnp.float32)
    if interleaved:
        even, odd = wide[..., 0::2], wide[..., 1::2]
        rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return rotated.reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x.dtype)
