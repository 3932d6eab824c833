"""What a selection asks of a request's device buffer.

Only numbers move here. The rule is SGLang's HiSparse, made total: -1 may stand anywhere among the
positions, a duplicate gets the slot of its first occurrence, and what has no row gives -1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from jmla._checks import check_int32
from jmla._mosaic_cache import takes_kernel
from jmla.hisparse._mosaic import HiSparseImplementation, swap_reasons
from jmla.hisparse._mosaic import plan_swap as plan_by_kernel
from jmla.hisparse.lru import plan_by_xla
from jmla.hisparse.residency import Residency
from jmla.hisparse.sizes import HiSparseSizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Swap:
    """What one selection asks of the rows; a layer that reuses the selection replays it.

    Attributes:
        slots: int32, in the shape of the positions: the device row of each, -1 for none.
        sources: int32 `[requests, n]`, the host row of each position to be fetched; -1 for the
            others, so that the misses of a request are counted by `sources >= 0`.
        targets: int32 `[requests, n]`, the device row where each of them goes.
    """

    slots: Int32[Array, "requests *rest"]
    sources: Int32[Array, "requests n"]
    targets: Int32[Array, "requests n"]


def plan_swap(
    residency: Residency,
    positions: Int[Array, "requests *rest"],
    seq_lens: Int[Array, " requests"],
    *,
    implementation: HiSparseImplementation | None = None,
) -> tuple[Residency, Swap]:
    """Finds a slot for every selected position and says which rows must be fetched.

    For each request, over its positions in order:

    - A position in a reserved slot, or in another slot, is a hit.
    - Any other is a miss. Misses take, in order of first occurrence, the slots that no position
      hit, least recently used first; a slot that holds nothing counts as one of them.
    - The new LRU order is the slots not used, as they were; then those just filled, in the order
      of the misses; then those hit, as they were.
    - A request of at most `device_buffer_size` tokens whose selected tokens each lie in the slot
      of their own position is looked up directly: its LRU order does not change. That is every
      such request, unless rejected draft tokens have taken it back below the size.

    Negative positions, positions at or past `seq_lens`, and positions without a host page give -1
    and change nothing. So do misses for which the request owns no free slot, which `HiSparsePool`
    does not let happen.

    Args:
        residency: before the step, with the step's own tokens already placed.
        positions: int32 `[requests, k]`, or `[requests, s_q, k]` for several tokens of a request,
            which share its buffer; at most `device_buffer_size` per request.
        seq_lens: int32 `[requests]`, the new tokens included; 0 for an idle row.
        implementation: "mosaic_gpu", "xla", or None for the kernel where it serves the call. Both
            give the same integers.

    Returns:
        The residency after the step, and what to do with the rows.

    Raises:
        ValueError: wrong shapes or dtypes, or more positions than the buffer has slots.
        NotImplementedError: the kernel is asked for and cannot serve the call.
    """
    selected = flat_selection(residency.sizes, positions, seq_lens)
    kernel = takes_kernel(implementation, lambda: swap_reasons(residency, selected.shape[1]))
    run = plan_by_kernel if kernel else plan_by_xla
    planned = run(residency, selected, seq_lens)
    swap = Swap(planned.slots.reshape(positions.shape), planned.sources, planned.targets)
    return dataclasses.replace(residency, tokens=planned.tokens, lru=planned.lru), swap


def flat_selection(
    sizes: HiSparseSizes, positions: Int[Array, "requests *rest"], seq_lens: Int[Array, " requests"]
) -> Int32[Array, "requests n"]:
    """The positions of each request in one axis.

    Raises:
        ValueError: see `plan_swap`.
    """
    check_int32("seq_lens", seq_lens, (sizes.requests,))
    if positions.ndim < 2 or positions.shape[0] != sizes.requests or positions.dtype != jnp.int32:
        raise ValueError(
            f"{positions.shape=} {positions.dtype=}: expected int32 [{sizes.requests}, k] or "
            f"[{sizes.requests}, s_q, k], the selection of each request"
        )
    selected = positions.reshape(sizes.requests, -1)
    if not 1 <= selected.shape[1] <= sizes.device_buffer_size:
        raise ValueError(
            f"{positions.shape=}: {selected.shape[1]} positions of a request: expected 1 to "
            f"{sizes.device_buffer_size=}, since all of them are in its buffer together; raise "
            "HiSparseConfig.device_buffer_size"
        )
    return selected
