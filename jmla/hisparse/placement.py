"""Where a request's tokens go as it is admitted, appended to and released: numbers alone."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from jmla.hisparse.residency import Residency


def place_new(
    residency: Residency, seq_lens: Int[Array, " requests"], count: int
) -> tuple[Residency, Int32[Array, "requests count"], Int32[Array, "requests count"]]:
    """Makes the last `count` tokens of each request resident.

    Returns:
        The residency after it, and the host row and the device row of each token, int32
        `[requests, count]`; -1 for a token that is dropped: of an idle row (`seq_lens` 0), before
        the request's first, or without a host page.
    """
    size = residency.sizes.device_buffer_size
    fits = seq_lens[:, None] <= size
    nth = jnp.arange(count, dtype=jnp.int32)
    position = seq_lens[:, None] - count + nth[None, :]
    host = residency.host_slots(position)
    slot = jnp.where(fits, position, size + nth[None, :])
    slot = jnp.where(host >= 0, slot, -1)

    # Later positions are drafts that were rejected, or are written now; neither may be found.
    first = position[:, :1]
    stale = (residency.tokens >= first) | _reserved(residency)
    tokens = jnp.where(stale & (seq_lens[:, None] > 0), -1, residency.tokens)
    request = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)
    tokens = tokens.at[request[:, None], slot].set(
        position, mode="drop", wrap_negative_indices=False
    )
    after = dataclasses.replace(residency, tokens=tokens)
    return after, host, residency.buffer_rows_of(slot)


def place_prompt(
    residency: Residency, request: Int[Array, ""], length: Int[Array, ""]
) -> Residency:
    """Makes the first tokens of an admitted request resident, each in the slot of its position."""
    sizes = residency.sizes
    slot = jnp.arange(sizes.buffer_slots, dtype=jnp.int32)
    tokens = jnp.where(slot < jnp.minimum(length, sizes.device_buffer_size), slot, -1)
    return _with_row(residency, request, tokens)


def forget(residency: Residency, request: Int[Array, ""]) -> Residency:
    """Takes everything from a request: its pages, its slots and its LRU order."""
    sizes = residency.sizes
    empty = _with_row(residency, request, jnp.full(sizes.buffer_slots, -1, jnp.int32))
    tables = (residency.page_table, residency.buffer_table)
    pages, buffers = (
        table.at[request].set(-1, mode="drop", wrap_negative_indices=False) for table in tables
    )
    return dataclasses.replace(empty, page_table=pages, buffer_table=buffers)


def _with_row(residency: Residency, request: Array, tokens: Array) -> Residency:
    order = jnp.arange(residency.sizes.device_buffer_size, dtype=jnp.int32)
    row = residency.tokens.at[request], residency.lru.at[request]
    after, lru = (
        at.set(new, mode="drop", wrap_negative_indices=False)
        for at, new in zip(row, (tokens, order), strict=True)
    )
    return dataclasses.replace(residency, tokens=after, lru=lru)


def _reserved(residency: Residency) -> Array:
    slot = jnp.arange(residency.sizes.buffer_slots, dtype=jnp.int32)
    return (slot >= residency.sizes.device_buffer_size)[None, :]
