"""Caches and rows that several HiSparse tests use."""

import jax
import jax.numpy as jnp
import numpy as np

from jmla.cache import Cache, init_cache
from tests.layouts.cases import FORMATS, RANK, ROPE_DIM

INDEX_DIM = 32


def latents_of(numbers: np.ndarray) -> jax.Array:
    """bf16 `[..., 2]` rows that spell a token's number, below 16384, exactly."""
    return jnp.asarray(np.stack([numbers // 128, numbers % 128], axis=-1), jnp.bfloat16)


def full_cache(name: str, num_pages: int) -> Cache:
    """An empty cache on the device, of pages of 4, in one of `FORMATS`."""
    layout, options = FORMATS[name]
    return init_cache(
        layout,
        num_pages=num_pages,
        page_size=4,
        rank=RANK,
        rope_dim=ROPE_DIM,
        index_dim=INDEX_DIM,
        **options,
    )
