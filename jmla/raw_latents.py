"""Latents as a projection gives them, of which a cache stores the normalised and rotated ones."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jmla.layouts._scales import to_bf16
from jmla.layouts.base import check_latents
from jmla.norm import rms_norm
from jmla.rope import rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawLatents:
    """New tokens' latents before RMSNorm of the no-position part and RoPE of the rotary part.

    `jmla.append` takes them in the place of latents, and its kernel normalises, rotates, quantises
    and stores in one pass.

    Attributes:
        values: bf16 or f32 `[n, rank + rope_dim]`, what the down projection gives.
        gain: bf16 or f32 `[rank]`, of the norm.
        cos: f32 `[n, rope_dim // 2]`, of each pair's angle (`jmla.model.cos_sin`).
        sin: f32 `[n, rope_dim // 2]`.
        eps: of the norm; static.
        interleaved: whether pairs are neighbours, as in MLA, or (i, i + rope_dim / 2); static.
    """

    values: Float[Array, "n width"]
    gain: Float[Array, " rank"]
    cos: Float32[Array, "n pairs"]
    sin: Float32[Array, "n pairs"]
    eps: float = dataclasses.field(kw_only=True, metadata={"static": True})
    interleaved: bool = dataclasses.field(kw_only=True, default=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[n, width]`."""
        return self.values.shape

    @property
    def rank(self) -> int:
        """The number of values that are normalised."""
        return self.gain.shape[0]

    def check(self, rank: int, rope_dim: int) -> None:
        """Raises ValueError unless these are latents of `rank + rope_dim` values."""
        check_latents(self.values, rank + rope_dim)
        if self.gain.shape != (rank,) or self.gain.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(
                f"{self.gain.shape=} {self.gain.dtype=}: expected bfloat16 or float32 [{rank}], a "
                "gain for each value that is normalised"
            )
        pairs = (self.values.shape[0], rope_dim // 2)
        for name, angles in (("cos", self.cos), ("sin", self.sin)):
            if angles.shape != pairs or angles.dtype != jnp.float32:
                raise ValueError(
                    f"{name}: {angles.shape=} {angles.dtype=}: expected float32 {pairs}, one for "
                    "each token and pair; see jmla.model.cos_sin"
                )
        if rope_dim % 2:
            raise ValueError(f"{rope_dim=}: expected an even number, rotary values come in pairs")

    def prepared(self) -> Float[Array, "n width"]:
        """The latents, of the dtype of `values`: f32 arithmetic, rounded once for good."""
        nope, rope = jnp.split(self.values.astype(jnp.float32), [self.rank], axis=-1)
        nope = rms_norm(nope, self.gain, self.eps)
        rope = rotate(rope, self.cos, self.sin, interleaved=self.interleaved)
        latents = jnp.concatenate([nope, rope], axis=-1)
        return to_bf16(latents) if self.values.dtype == jnp.bfloat16 else latents
