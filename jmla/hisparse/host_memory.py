"""Rows in host memory: putting them there, reading and writing some of them inside jit.

JAX's types tell host memory from device memory and refuse to mix them, so that what touches the
host's arrays runs as host code, and only the rows asked for cross the link. The Hopper kernels of
`jmla.hisparse._mosaic` and `jmla._mosaic_cache` do not go that way: to the GPU a pinned array is
memory like any other.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int

from jmla.layouts.base import Rows, TokenRows, check_slots, movable

HostMemory = Literal["pinned_host", "device"]
"""Where host rows are: page-locked host memory, or the default memory, which on a CPU is the
host's."""

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def place_rows(rows: Rows, memory: HostMemory | None = None) -> Rows:
    """The rows in host memory.

    Args:
        rows: rows of any layout.
        memory: "pinned_host", or "device" for plain arrays; None is "pinned_host" if JAX's default
            device is a GPU, and "device" if not.

    Raises:
        ValueError: `memory` is neither, or the device cannot address it.
        MemoryError: there is not that much host memory.
    """
    sharding = _sharding(memory)
    return rows if sharding is None else rows.map_tokens(lambda leaf: _placed(leaf, sharding))


def zero_host_rows(empty: Rows, num_pages: int, memory: HostMemory | None = None) -> Rows:
    """Pages of zeros in host memory, which do not pass through the device's.

    Args:
        empty: rows of token shape `(0, page_size)`.
        num_pages: how many pages.
        memory: as in `place_rows`, and so are the errors.
    """
    sharding = _sharding(memory)

    def zeros(leaf: Array) -> Array:
        shape = num_pages, *leaf.shape[1:]
        if sharding is None:
            return jnp.zeros(shape, leaf.dtype)
        return _placed(np.zeros(shape, leaf.dtype), sharding)

    return empty.map_tokens(zeros)


def _sharding(memory: HostMemory | None) -> SingleDeviceSharding | None:
    """Where rows go; None for plain arrays."""
    device = jax.local_devices()[0]
    if memory is None:
        memory = "pinned_host" if device.platform == "gpu" else "device"
    kinds = tuple(kind.kind for kind in device.addressable_memories())
    if memory not in ("pinned_host", "device") or memory not in kinds:
        raise ValueError(
            f"{memory=}: expected 'pinned_host' or 'device'; {device} addresses {kinds}"
        )
    return None if memory == "device" else SingleDeviceSharding(device, memory_kind=memory)


def _placed(leaf: Array | np.ndarray, sharding: SingleDeviceSharding) -> Array:
    try:
        return jax.block_until_ready(jax.device_put(leaf, sharding))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"{leaf.nbytes=}: there is not as much pinned host memory: make the state with fewer "
            "pages, or raise XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, JAX's own limit, if the machine "
            "has more"
        ) from error


def read_rows[T: TokenRows](rows: T, slots: Int[Array, "..."]) -> T:
    """`rows.gather(slots)` with the result in device memory, wherever `rows` are."""
    if not in_host_memory(rows):
        return rows.gather(slots)
    check_slots(slots)
    known = (slots >= 0) & (slots < rows.num_slots)
    asked = jax.device_put(jnp.where(known, slots, 0), _HOST)

    def take(leaf: Array) -> Array:
        taken = jax.device_put(_on_host(_take)(leaf, asked), _DEVICE)
        mask = known.reshape(*known.shape, *[1] * (taken.ndim - known.ndim))
        return lax.bitcast_convert_type(jnp.where(mask, taken, jnp.zeros_like(taken)), leaf.dtype)

    return rows.flat().map_tokens(take)


def write_rows[T: TokenRows](rows: T, slots: Int[Array, "..."], new: T) -> T:
    """`rows.set(slots, new)` with `new` in device memory, wherever `rows` are."""
    if not in_host_memory(rows):
        return rows.set(slots, new)
    check_slots(slots)
    asked = jax.device_put(slots, _HOST)

    def put(leaf: Array, rows: Array) -> Array:
        return _on_host(_put)(leaf, asked, jax.device_put(rows, _HOST))

    return rows.flat().map_tokens(put, new).reshape(*rows.shape)


def copy_by_xla[T: TokenRows](
    source: T, target: T, source_slots: Int[Array, "..."], target_slots: Int[Array, "..."]
) -> T:
    """`jmla.hisparse._mosaic.copy_rows` without a kernel."""
    exists = (source_slots >= 0) & (source_slots < source.num_slots)
    return write_rows(target, jnp.where(exists, target_slots, -1), read_rows(source, source_slots))


def in_host_memory(rows: TokenRows) -> bool:
    """Whether JAX holds the rows in host memory; plain arrays on a CPU are not, to JAX."""
    name = next(iter(rows.token_leaves))
    return jax.typeof(getattr(rows, name)).memory_space == _HOST


def _on_host(fn: Callable[..., Array]) -> Callable[..., Array]:
    return compute_on(fn, compute_type="device_host", out_memory_spaces=_HOST)


def _take(leaf: Array, slots: Array) -> Array:
    # No fill value: a constant would be in device memory.
    return movable(leaf).at[slots].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _put(leaf: Array, slots: Array, rows: Array) -> Array:
    stored = movable(leaf).at[slots].set(movable(rows), mode="drop", wrap_negative_indices=False)
    return lax.bitcast_convert_type(stored, leaf.dtype)
