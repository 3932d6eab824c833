"""The rate of the link between host memory and the device, which transfers are held against."""

import functools
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import SingleDeviceSharding

from benchmarks.timing import Call, Timer


class Link(NamedTuple):
    """GB/s to and from host memory."""

    to_device: float
    to_host: float


def measure_link(timer: Timer, size: int) -> Link:
    """The rates of copies of `size` bytes between pinned and device memory, both ways."""
    device = jax.devices()[0]
    here = jax.device_put(jnp.zeros(size, jnp.uint8), SingleDeviceSharding(device))
    there = jax.device_put(here, SingleDeviceSharding(device, memory_kind="pinned_host"))

    def seconds(call: Call) -> float:
        # A copy engine's work is no kernel, so this is the host's clock.
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        return min(times)

    copies = [
        seconds(functools.partial(jax.device_put, source, like.sharding))
        for source, like in ((there, here), (here, there))
    ]
    rates = [size / s / 1e9 for s in copies]
    if device.platform == "gpu":
        rates[0] = max(rates[0], _bulk_read(timer, there))
    return Link(*rates)


def _bulk_read(timer: Timer, there: Array) -> float:
    from pallas_kernels.hot_buffer import copy_rows

    row = 4096
    rows = there.size // row
    order = jnp.arange(rows, dtype=jnp.int32)
    buffer = [jnp.zeros((rows, row), jnp.uint8)]
    read = jax.jit(
        lambda there, buffer: copy_rows(
            {"rows": there}, {"rows": buffer}, order, order, num_sources=rows, num_targets=rows
        )["rows"],
        donate_argnums=1,
    )

    def call() -> object:
        buffer[0] = read(there, buffer[0])
        return buffer[0]

    us = timer.measure(itertools.repeat(call), jax.block_until_ready, what="bulk read")
    return there.size / us / 1e3
