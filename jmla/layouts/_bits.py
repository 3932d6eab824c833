"""Arrays as the bytes that other engines store, without rounding anything."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, UInt8

from jmla.layouts.base import KVLayout


def to_u8(array: Array) -> UInt8[Array, "*tokens bytes"]:
    """The little-endian bytes of the last axis: [..., n] of any dtype -> u8 [..., n * itemsize]."""
    if array.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(array, jnp.uint8)
    split = jax.lax.bitcast_convert_type(array, jnp.uint8)
    return split.reshape(*array.shape[:-1], array.shape[-1] * array.dtype.itemsize)


def from_u8(packed: UInt8[Array, "*tokens bytes"], dtype: DTypeLike) -> Array:
    """The reverse of `to_u8`: u8 [..., n * itemsize] -> [..., n] of `dtype`."""
    size = jnp.dtype(dtype).itemsize
    if size == 1:
        return jax.lax.bitcast_convert_type(packed, dtype)
    grouped = packed.reshape(*packed.shape[:-1], packed.shape[-1] // size, size)
    return jax.lax.bitcast_convert_type(grouped, dtype)


def check_unpaged(layout: KVLayout, page_argument: int | None) -> None:
    """Raises ValueError if a page size or stride is given to a layout that packs row by row."""
    if page_argument is not None:
        raise ValueError(
            f"page_bytes or page_size {page_argument}: expected None, {layout.name} packs each row "
            "by itself and only FP8_V4 packs whole pages; use rows.reshape for token axes"
        )


def check_packed(packed: UInt8[Array, "*tokens bytes"], num_bytes: int, what: str) -> None:
    """Raises ValueError unless `packed` is a u8 array whose last axis has `num_bytes`."""
    if packed.dtype != jnp.uint8:
        raise ValueError(f"{packed.dtype=}: expected uint8; view the buffer as bytes")
    if packed.ndim == 0 or packed.shape[-1] != num_bytes:
        raise ValueError(
            f"{packed.shape=}: expected a last axis of {num_bytes} bytes, one row of {what}; "
            "pass the layout, rank and rope_dim with which it was written"
        )


def join_pages(
    values: UInt8[Array, "*pages page a"], footer: UInt8[Array, "*pages page b"], page_bytes: int
) -> UInt8[Array, "*pages page_bytes"]:
    """Whole pages: all tokens' value bytes, then all tokens' footer bytes, then zeros.

    Raises:
        ValueError: a page does not fit in `page_bytes`.
    """
    pages, used = values.shape[:-2], values.shape[-2] * (values.shape[-1] + footer.shape[-1])
    if page_bytes < used:
        raise ValueError(
            f"{page_bytes=}: expected at least {used}, the bytes of {values.shape[-2]} tokens"
        )
    parts = [
        values.reshape(*pages, values.shape[-2] * values.shape[-1]),
        footer.reshape(*pages, footer.shape[-2] * footer.shape[-1]),
        jnp.zeros((*pages, page_bytes - used), jnp.uint8),
    ]
    return jnp.concatenate(parts, axis=-1)


def split_pages(
    packed: UInt8[Array, "*pages page_bytes"], page_size: int, value_bytes: int, footer_bytes: int
) -> tuple[UInt8[Array, "*pages page a"], UInt8[Array, "*pages page b"]]:
    """The reverse of `join_pages`; bytes beyond the two parts are ignored.

    Raises:
        ValueError: `packed` is not u8, or its last axis cannot hold a page.
    """
    if packed.dtype != jnp.uint8:
        raise ValueError(f"{packed.dtype=}: expected uint8; view the buffer as bytes")
    used = page_size * (value_bytes + footer_bytes)
    if page_size < 1 or packed.ndim == 0 or packed.shape[-1] < used:
        raise ValueError(
            f"{packed.shape=} {page_size=}: expected a last axis of at least {used} bytes, a page "
            f"of {page_size} tokens; pass the page_size with which it was written"
        )
    pages, footer_start = packed.shape[:-1], page_size * value_bytes
    values = packed[..., :footer_start].reshape(*pages, page_size, value_bytes)
    footer = packed[..., footer_start:used].reshape(*pages, page_size, footer_bytes)
    return values, footer
