"""One layer's host-resident cache: all rows in host memory, the rows in use on the device."""

import dataclasses

import jax
from jaxtyping import Array, Int, Int32

from jmla._checks import check_int32
from jmla._mosaic_cache import takes_kernel
from jmla.hisparse._mosaic import (
    HiSparseImplementation,
    copy_reasons,
    copy_rows,
    swap_reasons,
    swap_rows,
)
from jmla.hisparse.host_memory import HostMemory, copy_by_xla, zero_host_rows
from jmla.hisparse.residency import Residency
from jmla.hisparse.sizes import HiSparseSizes
from jmla.hisparse.swap import Swap, flat_selection, plan_swap
from jmla.layouts.base import KVLayout, Rows, ScaleFormat
from jmla.layouts.codec import zero_rows
from jmla.layouts.index_keys import IndexKeyRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiSparseState:
    """Rows of one layer, and which of them its device buffers hold.

    Every row is in host memory from the step that made it on; the device holds copies. So nothing
    is lost by evicting a slot. Index keys stay on the device, all of them, under the same page
    table as the host rows.

    Attributes:
        host_rows: rows of token shape `(num_pages, page_size)`.
        buffer_rows: rows of the same format, `(num_buffer_pages, page_size)`, which attention
            reads.
        residency: what the buffers hold.
        index_keys: index keys of the token shape of `host_rows`, or None.
    """

    host_rows: Rows
    buffer_rows: Rows
    residency: Residency
    index_keys: IndexKeyRows | None = None

    @property
    def layout(self) -> KVLayout:
        """How a latent row is stored, in both memories."""
        return self.buffer_rows.layout

    @property
    def sizes(self) -> HiSparseSizes:
        """The static sizes."""
        return self.residency.sizes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return self.host_rows.num_slots * self.host_rows.bytes_per_token

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory: buffer rows, index keys and the tables."""
        index = self.index_keys
        keys = 0 if index is None else index.num_slots * index.bytes_per_token
        tables: list[Array] = jax.tree.leaves(self.residency)
        rows = self.buffer_rows.num_slots * self.buffer_rows.bytes_per_token
        return rows + keys + sum(table.size * table.dtype.itemsize for table in tables)


def init_state(
    layout: KVLayout,
    sizes: HiSparseSizes,
    *,
    rank: int | None = None,
    rope_dim: int = 64,
    scale_format: ScaleFormat = "pow2",
    index_dim: int | None = None,
    index_scale_format: ScaleFormat = "fp32",
    index_hadamard: bool = False,
    scale: Array | float | None = None,
    host_memory: HostMemory | None = None,
) -> HiSparseState:
    """A state of zeros, whose requests own no pages.

    Args:
        layout: how a latent row is stored, on the host and on the device.
        sizes: how many rows there are of what.
        rank: number of no-position values; None takes the layout's default.
        rope_dim: number of rotary values.
        scale_format: which scales a block may have; only the block-scale layout looks at it.
        index_dim: length of an index key; None makes a state without index keys.
        index_scale_format: which scales an index key may have.
        index_hadamard: as of `jmla.init_cache`.
        scale: the scale of the whole tensor, for FP8_NOPE_FP8_ROPE alone; None is exactly 1. The
            caches that requests are admitted from must have the same one.
        host_memory: where the host rows are, see `place_rows`; None is "pinned_host" on a GPU and
            plain arrays elsewhere.

    Raises:
        ValueError: the layout is not defined for the rank, or the memory does not exist here.
        MemoryError: there is not that much host memory.
    """

    def rows(num_pages: int) -> Rows:
        return zero_rows(
            layout,
            (num_pages, sizes.page_size),
            rank=rank,
            rope_dim=rope_dim,
            scale_format=scale_format,
            scale=scale,
        )

    index_keys = None
    if index_dim is not None:
        shape = (sizes.num_pages, sizes.page_size)
        index_keys = IndexKeyRows.zeros(
            shape, dim=index_dim, scale_format=index_scale_format, hadamard=index_hadamard
        )
    return HiSparseState(
        zero_host_rows(rows(0), sizes.num_pages, host_memory),
        rows(sizes.num_buffer_pages),
        Residency.empty(sizes),
        index_keys,
    )


def swap_in(
    state: HiSparseState,
    positions: Int[Array, "requests *rest"],
    seq_lens: Int[Array, " requests"],
    *,
    implementation: HiSparseImplementation | None = None,
) -> tuple[HiSparseState, Int32[Array, "requests *rest"]]:
    """Brings the selected rows of every request into its device buffer.

    Args:
        state: with the step's tokens appended. Donate it to update the rows in place.
        positions: int32 `[requests, k]` or `[requests, s_q, k]`; see `plan_swap`.
        seq_lens: int32 `[requests]`, the new tokens included; 0 for an idle row.
        implementation: "mosaic_gpu", one kernel; "xla"; or None for the kernel where it serves
            the call. Both give the same bits.

    Returns:
        The state after the step, and the slots of `state.buffer_rows` to attend to, int32 in the
        shape of `positions`, -1 for what has no row.

    Raises:
        ValueError: see `plan_swap`.
        NotImplementedError: likewise.
    """
    moved = state.host_rows, state.buffer_rows
    selected = flat_selection(state.sizes, positions, seq_lens)

    def reasons() -> list[str]:
        return [*swap_reasons(state.residency, selected.shape[1]), *copy_reasons(*moved)]

    if takes_kernel(implementation, reasons):
        residency, slots, rows = swap_rows(state.residency, *moved, selected, seq_lens)
        state = dataclasses.replace(state, buffer_rows=rows, residency=residency)
        return state, slots.reshape(positions.shape)
    residency, swap = plan_swap(state.residency, positions, seq_lens, implementation=implementation)
    return replay(state, residency, swap, implementation=implementation), swap.slots


def replay(
    state: HiSparseState,
    residency: Residency,
    swap: Swap,
    *,
    implementation: HiSparseImplementation | None = None,
) -> HiSparseState:
    """Fetches the rows that `swap` names, in a layer that reuses another layer's selection.

    The anchor layer calls `plan_swap` and replays it itself; its followers replay the same. They
    then attend to the same `swap.slots`, each in its own `buffer_rows`. A follower may replay
    before it appends the step's own tokens, which are never fetched, and so ahead of its turn.

    Args:
        state: of this layer, with a residency equal to the anchor's before the step: layers that
            share selections have the same pages, admissions, appends and releases.
        residency: what `plan_swap` returned for the anchor.
        swap: likewise.
        implementation: as in `swap_in`.

    Raises:
        ValueError: the residency is of other sizes.
        NotImplementedError: the kernel is asked for and cannot serve the call.
    """
    if residency.sizes != state.sizes:
        raise ValueError(
            f"{residency.sizes=}: expected {state.sizes}; layers that share a selection have the "
            "same sizes"
        )
    moved = state.host_rows, state.buffer_rows
    kernel = takes_kernel(implementation, lambda: copy_reasons(*moved))
    copy = copy_rows if kernel else copy_by_xla
    buffer_rows = copy(*moved, swap.sources, swap.targets)
    return dataclasses.replace(state, buffer_rows=buffer_rows, residency=residency)


def assign_pages(
    state: HiSparseState,
    page_table: Int[Array, "requests pages"],
    buffer_table: Int[Array, "requests buffer_pages"],
) -> HiSparseState:
    """The state with other page tables, as `HiSparsePool` gives them when requests grow.

    A page that a request keeps must keep its place in the table; new ones follow it.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    sizes = state.sizes
    check_int32("page_table", page_table, (sizes.requests, sizes.max_pages))
    check_int32("buffer_table", buffer_table, (sizes.requests, sizes.max_buffer_pages))
    residency = dataclasses.replace(
        state.residency, page_table=page_table, buffer_table=buffer_table
    )
    return dataclasses.replace(state, residency=residency)
