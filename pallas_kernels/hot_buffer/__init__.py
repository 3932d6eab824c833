"""Which rows of a host-resident cache the device's buffers hold, and bringing others there.

One block of the grid applies the LRU rule to a request's selection in shared memory; then warps of
the whole device copy the rows that are missing, straight out of pinned host memory.
"""

from pallas_kernels.hot_buffer.call import Planned as Planned
from pallas_kernels.hot_buffer.call import copy_rows as copy_rows
from pallas_kernels.hot_buffer.call import place_new as place_new
from pallas_kernels.hot_buffer.call import plan_swap as plan_swap
from pallas_kernels.hot_buffer.call import problems as problems
from pallas_kernels.hot_buffer.call import swap_rows as swap_rows
from pallas_kernels.hot_buffer.shape import Shape as Shape
