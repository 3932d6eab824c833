"""Raw index queries, and what they become, step by step in numpy."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jmla.index_query import RawIndexQueries
from jmla.layouts.index_keys import quantize_index_keys

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and what is static of a call."""

    tokens: int = 5
    heads: int = 6
    dim: int = 128
    rope_dim: int = 64
    interleaved: bool = False
    hadamard: bool = True
    pow2: bool = True
    f32: bool = False

    def draw(self, seed: int = 0) -> RawIndexQueries:
        """Queries of many sizes, zeros, infinities and NaN among them."""
        rng = np.random.default_rng(seed)
        size = np.exp(2 * rng.standard_normal((self.tokens, self.heads, 1)))
        q = rng.standard_normal((self.tokens, self.heads, self.dim)) * size
        q[0, 0] = 0
        q[-1, -1, 3], q[-1, 0, 5] = np.nan, np.inf
        angle = rng.uniform(0, 2 * np.pi, (self.tokens, self.rope_dim // 2))
        return RawIndexQueries(
            jnp.asarray(q, jnp.float32 if self.f32 else jnp.bfloat16),
            jnp.asarray(rng.standard_normal((self.tokens, self.heads)), jnp.float32),
            jnp.asarray(np.cos(angle), jnp.float32),
            jnp.asarray(np.sin(angle), jnp.float32),
            interleaved=self.interleaved,
        )

    def expected(self, raw: RawIndexQueries) -> tuple[np.ndarray, np.ndarray]:
        """Codes as bytes and weights: every sum and product of f32 rounded by itself."""
        dtype = np.dtype(np.float32) if self.f32 else BF16

        def rounded(x: np.ndarray) -> np.ndarray:
            return x.astype(dtype).astype(np.float32)

        x = np.asarray(raw.values).astype(np.float32)
        with np.errstate(all="ignore"):
            if self.rope_dim:
                x[..., : self.rope_dim] = rounded(self._rotated(raw, x[..., : self.rope_dim]))
            if self.hadamard:
                x = rounded(self._butterflies(x) * np.float32(self.dim**-0.5))
            rows = quantize_index_keys(jnp.asarray(x), scale_format="pow2" if self.pow2 else "fp32")
            weights = np.asarray(raw.weights) * np.asarray(rows.scales)
        return np.asarray(rows.keys).view(np.uint8), weights

    def _rotated(self, raw: RawIndexQueries, x: np.ndarray) -> np.ndarray:
        cos, sin = (np.asarray(each)[:, None] for each in (raw.cos, raw.sin))
        out = np.empty_like(x)
        half = self.rope_dim // 2
        a, b = (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(half), None)
        b = b or slice(half, None)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
        return out

    def _butterflies(self, x: np.ndarray) -> np.ndarray:
        distance = 1
        while distance < self.dim:
            pairs = x.reshape(*x.shape[:-1], -1, 2, distance)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
            distance *= 2
        return x


CASES = (
    Case(),
    Case(interleaved=True, hadamard=False),
    Case(rope_dim=128, pow2=False),
    Case(rope_dim=32, interleaved=True, f32=True),
    Case(rope_dim=16, hadamard=False, pow2=False, f32=True),
    Case(rope_dim=0, heads=3),
    Case(dim=64, rope_dim=64, heads=5),
    Case(dim=64, rope_dim=16, interleaved=True, pow2=False),
)
