"""The formats that every layout test runs over, and how their bytes are compared."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmla.layouts import KVLayout, Rows, dequantize, quantize

BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
RAW = KVLayout.FP8_NOPE_FP8_ROPE

RANK, ROPE_DIM = 128, 16
"""A small row for which every layout is defined."""

FORMATS: dict[str, tuple[KVLayout, dict[str, Any]]] = {
    "bf16": (KVLayout.BF16, {}),
    "fp8": (RAW, {}),
    "fp8_scale": (RAW, {"scale": 0.3}),
    "pow2": (BLOCK, {"scale_format": "pow2"}),
    "fp32": (BLOCK, {"scale_format": "fp32"}),
    "fp4": (KVLayout.FP4, {}),
    "v4": (KVLayout.FP8_V4, {}),
}


def latents(*shape: int, seed: int = 0, width: int = RANK + ROPE_DIM) -> jax.Array:
    """bf16 latents whose rows differ in magnitude by factors of up to 2^16."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((*shape, width)) * 2.0 ** rng.uniform(-8, 8, (*shape, 1))
    return jnp.asarray(values, jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("layout", "scale_format", "rope_dim"))
def quantized(x: jax.Array, layout: KVLayout, *, rope_dim: int = ROPE_DIM, **options: Any) -> Rows:
    """`quantize` under jit, which is the faster form to compile."""
    return quantize(x, layout, rope_dim=rope_dim, **options)


read = jax.jit(dequantize)
"""`dequantize` under jit."""


@functools.cache
def small_rows(name: str, *shape: int, seed: int = 0) -> Rows:
    """Random rows of one of `FORMATS` with token axes `shape`."""
    layout, options = FORMATS[name]
    return quantized(latents(*shape, seed=seed), layout, **options)


def leaf_bytes(tree: object) -> list[np.ndarray]:
    """The bytes of each leaf, so that NaN and -0.0 compare as what is stored."""
    return [np.atleast_1d(np.asarray(leaf)).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def assert_same_rows(ours: object, theirs: object) -> None:
    """The same format and the same bytes."""
    our_format: object = jax.tree.structure(ours)
    assert our_format == jax.tree.structure(theirs)
    for a, b in zip(leaf_bytes(ours), leaf_bytes(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def u16(array: jax.Array) -> np.ndarray:
    """The bit patterns of a bf16 array."""
    assert array.dtype == jnp.bfloat16, f"{array.dtype=}"
    return np.asarray(array).view(np.uint16)
