"""A cache whose rows live in host memory, with a small buffer per request on the device.

A layer's `HiSparseState` takes the place of its `Cache` in decode: `append` the step's tokens,
`swap_in` the selected positions, and attend to `state.buffer_rows` at the slots that come back.
`HiSparsePool` hands out pages outside jit. docs/hisparse.md tells how these go together.
"""

from jmla.hisparse._mosaic import HiSparseImplementation
from jmla.hisparse.host_memory import HostMemory
from jmla.hisparse.lifecycle import admit, append, release
from jmla.hisparse.pool import HiSparseCapacityError, HiSparsePool
from jmla.hisparse.residency import Residency
from jmla.hisparse.sizes import HiSparseSizes
from jmla.hisparse.state import HiSparseState, assign_pages, init_state, replay, swap_in
from jmla.hisparse.swap import Swap, plan_swap

__all__ = [
    "HiSparseCapacityError",
    "HiSparseImplementation",
    "HiSparsePool",
    "HiSparseSizes",
    "HiSparseState",
    "HostMemory",
    "Residency",
    "Swap",
    "admit",
    "append",
    "assign_pages",
    "init_state",
    "plan_swap",
    "release",
    "replay",
    "swap_in",
]
