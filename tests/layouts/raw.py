"""Raw latents for tests, and what becomes of them in f64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_dtypes import bfloat16

from jmla import RawLatents

ROPE_DIM = 64


def raw_latents(
    n: int, *, rank: int, interleaved: bool = True, dtype: Any = bfloat16, seed: int = 0
) -> RawLatents:
    """Random values whose rows differ in magnitude by factors of up to 2^16, a row of zeros too."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, rank + ROPE_DIM)) * 2.0 ** rng.uniform(-8, 8, (n, 1))
    values[n // 2] = 0
    angle = rng.uniform(-4, 4, (n, ROPE_DIM // 2))
    return RawLatents(
        jnp.asarray(values.astype(dtype)),
        jnp.asarray(rng.uniform(0.5, 2, rank).astype(dtype)),
        jnp.asarray(np.cos(angle), jnp.float32),
        jnp.asarray(np.sin(angle), jnp.float32),
        eps=1e-6,
        interleaved=interleaved,
    )


def exact_raw_latents(n: int, *, rank: int, interleaved: bool) -> RawLatents:
    """Values of which no operation is rounded, and of a scale that fits no other row's."""
    rng = np.random.default_rng(9)
    scale = np.ldexp(1.0, np.arange(n)[:, None] % 41 - 20)
    values = rng.choice([-1.0, 1.0], (n, rank + ROPE_DIM)) * scale
    values[:, rank:] *= rng.choice([1, 1.5, 0.75], (n, ROPE_DIM))
    turns = rng.integers(0, 4, (n, ROPE_DIM // 2))
    return RawLatents(
        jnp.asarray(values, jnp.bfloat16),
        jnp.asarray(rng.choice([0.5, 1, 1.25, -2], rank), jnp.bfloat16),
        jnp.asarray(np.array([1, 0, -1, 0])[turns], jnp.float32),
        jnp.asarray(np.array([0, 1, 0, -1])[turns], jnp.float32),
        eps=0.0,
        interleaved=interleaved,
    )


def prepared(raw: RawLatents) -> np.ndarray:
    """By the definitions, in f64."""
    values = np.asarray(raw.values).astype(np.float64)
    nope, rope = np.split(values, [raw.rank], axis=-1)
    nope = nope / np.sqrt(np.mean(nope**2, axis=-1, keepdims=True) + raw.eps)
    nope = nope * np.asarray(raw.gain).astype(np.float64)
    pairs = rope.reshape(len(rope), -1, 2) if raw.interleaved else rope.reshape(len(rope), 2, -1)
    axis = 2 if raw.interleaved else 1
    x, y = np.moveaxis(pairs, axis, 0)
    cos, sin = np.asarray(raw.cos, np.float64), np.asarray(raw.sin, np.float64)
    rope = np.stack([x * cos - y * sin, x * sin + y * cos], axis=axis).reshape(rope.shape)
    return np.concatenate([nope, rope], axis=-1)


def assert_prepared(latents: object, raw: RawLatents, kept: np.ndarray) -> None:
    """bf16 of the rows `kept` of `raw`, of which few are rounded to the other neighbour."""
    ours = np.asarray(latents).astype(bfloat16)
    exact = prepared(raw)[kept]
    wide, nearest = ours.astype(np.float64), exact.astype(np.float32).astype(bfloat16)
    # f32 sums and products: the middle between two neighbours, and what cancels in a rotation.
    slack = 2.0**-8 * np.abs(exact) + 2.0**-20 * np.abs(exact).max(axis=-1, keepdims=True)
    assert (np.abs(wide - exact) <= slack).all()
    assert (ours.view(np.int16) != nearest.view(np.int16)).mean() < 1 / 200
