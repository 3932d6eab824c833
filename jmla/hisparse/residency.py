"""Which tokens of a request are in its device buffer, and where its rows are."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from jmla.hisparse.sizes import HiSparseSizes
from jmla.topk import paged_indices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residency:
    """What a layer's device buffers hold; layers that share a selection have equal ones.

    Attributes:
        page_table: int32 `[requests, max_pages]`, the host page of each `page_size` positions; -1
            for none.
        buffer_table: int32 `[requests, max_buffer_pages]`, the device page of each `page_size`
            buffer slots; -1 for none.
        tokens: int32 `[requests, buffer_slots]`, the position held by each slot, -1 for none. The
            last `newest` slots are the reserved ones.
        lru: int32 `[requests, device_buffer_size]`, the slots from the least recently used on.
        sizes: static.
    """

    page_table: Int32[Array, "requests pages"]
    buffer_table: Int32[Array, "requests buffer_pages"]
    tokens: Int32[Array, "requests slots"]
    lru: Int32[Array, "requests size"]
    sizes: HiSparseSizes = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, sizes: HiSparseSizes) -> "Residency":
        """Of requests that own nothing: slots in ascending order, none of them used."""
        slots = jnp.arange(sizes.device_buffer_size, dtype=jnp.int32)
        return cls(
            jnp.full((sizes.requests, sizes.max_pages), -1, jnp.int32),
            jnp.full((sizes.requests, sizes.max_buffer_pages), -1, jnp.int32),
            jnp.full((sizes.requests, sizes.buffer_slots), -1, jnp.int32),
            jnp.tile(slots, (sizes.requests, 1)),
            sizes,
        )

    def host_slots(
        self, positions: Int[Array, "rows n"], requests: Int[Array, " rows"] | None = None
    ) -> Int32[Array, "rows n"]:
        """The host row of each position, -1 for a position without one.

        Args:
            positions: int32 `[rows, n]`.
            requests: int32 `[rows]`, whose positions they are; None: row `i` is request `i`.
        """
        return _existing(positions, self.page_table, requests, self.sizes, self.sizes.num_pages)

    def buffer_rows_of(
        self, slots: Int[Array, "rows n"], requests: Int[Array, " rows"] | None = None
    ) -> Int32[Array, "rows n"]:
        """The device row of each buffer slot, -1 for a slot whose page the request does not own.

        Args:
            slots: int32 `[rows, n]`, numbered inside the request.
            requests: as in `host_slots`.
        """
        pages = self.sizes.num_buffer_pages
        return _existing(slots, self.buffer_table, requests, self.sizes, pages)


def _existing(
    places: Array, table: Array, requests: Array | None, sizes: HiSparseSizes, num_pages: int
) -> Array:
    rows = paged_indices(places, table, page_size=sizes.page_size, requests=requests)
    return jnp.where(rows < num_pages * sizes.page_size, rows, -1)
