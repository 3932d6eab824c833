"""Argument checks that several ops share."""

import jax.numpy as jnp
from jaxtyping import Array


def check_int32(name: str, value: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `value`, the argument called `name`, is int32 of this shape."""
    if value.shape != shape or value.dtype != jnp.int32:
        raise ValueError(
            f"{name}: got {value.dtype}{list(value.shape)}, expected int32{list(shape)}; "
            "pass one number per row, cast with .astype(jnp.int32)"
        )
