"""How a launch divides its work, from its sizes alone."""

import math

from pallas_kernels.device.simt import WARPGROUP
from pallas_kernels.hot_buffer.shape import Shape

MOST_THREADS = 1024
COPY_WARPGROUPS = 1
_BYTES_OF_SWAP_TOGETHER = 2624  # 21 registers of each lane
_BYTES_TOGETHER = 4608  # of a warp's rows under way: 36 registers of each lane


def plan_threads(shape: Shape) -> int:
    """Threads of a block that swaps one request."""
    items = max(shape.slots, shape.positions)
    return min(MOST_THREADS, WARPGROUP * math.ceil(items / WARPGROUP))


def rows_together(row_bytes: int) -> int:
    """Rows of a warp whose loads are under way at once."""
    return max(1, min(4, _BYTES_TOGETHER // row_bytes))


def rows_of_swap_together(row_bytes: int) -> int:
    """The same where the registers are those of a block that swaps a request."""
    return max(1, min(4, _BYTES_OF_SWAP_TOGETHER // row_bytes))
