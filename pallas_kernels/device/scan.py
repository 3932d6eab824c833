"""Sums over the threads of a block."""

from collections.abc import Callable, Sequence
from functools import partial

from pallas_kernels.device.memory import load_shared, store_shared
from pallas_kernels.device.simt import (
    WARP,
    Value,
    i32,
    minimum,
    select,
    sum_below,
    sum_of_warp,
    when,
)


def sums_before(
    values: Sequence[Value], thread: Value, threads: int, scratch: Value, sync: Callable[[], None]
) -> tuple[list[Value], list[Value]]:
    """The sums of the values of all threads before this one, and parts of the sums of all.

    A barrier must be between two calls.

    Args:
        values: summed each by itself.
        thread: this one.
        threads: of the block, at most 1024.
        scratch: the address of `WARP` words of shared memory for each value.
        sync: joins the threads.

    Returns:
        The sums before, and of each value what the warp of this lane's number has added: its
        `sum_of_warp` is the sum of all threads.
    """
    lane, warp, warps = thread & (WARP - 1), thread >> 5, threads // WARP
    up_to = [sum_below(value, lane) for value in values]
    places = [scratch + 4 * WARP * i for i in range(len(values))]
    for place, sum_ in zip(places, up_to, strict=True):
        when(lane.equals(WARP - 1), partial(store_shared, place + warp * 4, [sum_]))
    sync()
    before, parts = [], []
    for place, value, sum_ in zip(places, values, up_to, strict=True):
        (total,) = load_shared(place + minimum(lane, warps - 1) * 4, "r")
        before.append(sum_of_warp(select(lane < warp, total, i32(0))) + sum_ - value)
        parts.append(select(lane < warps, total, i32(0)))
    return before, parts
