"""Which tokens of a request are in its device buffer, and which must be fetched: the LRU rule.

Only numbers move here. The rule is SGLang's HiSparse, made total: -1 may stand anywhere among the
positions, a duplicate gets the slot of its first occurrence, and what has no row gives -1.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32

from jmla._checks import check_int32
from jmla._mosaic_cache import takes_kernel
from jmla._mosaic_hisparse import HiSparseImplementation, Planned, swap_reasons
from jmla._mosaic_hisparse import plan_swap as plan_by_kernel
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
    sizes = residency.sizes
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
    kernel = takes_kernel(implementation, lambda: swap_reasons(residency, selected.shape[1]))
    run = plan_by_kernel if kernel else plan_by_xla
    planned = run(residency, selected, seq_lens)
    swap = Swap(planned.slots.reshape(positions.shape), planned.sources, planned.targets)
    return dataclasses.replace(residency, tokens=planned.tokens, lru=planned.lru), swap


def plan_by_xla(
    residency: Residency, positions: Int[Array, "requests n"], seq_lens: Int[Array, " requests"]
) -> Planned:
    """`plan_swap` of arguments that were checked."""
    sizes = residency.sizes
    sources = residency.host_slots(positions)
    has_row = (positions >= 0) & (positions < seq_lens[:, None]) & (sources >= 0)
    wanted = jnp.where(has_row, positions, -1)
    slot = jnp.arange(sizes.buffer_slots, dtype=jnp.int32)
    all_slots = jnp.broadcast_to(slot, residency.tokens.shape)
    owned = residency.buffer_rows_of(all_slots) >= 0
    one = partial(_swap_one, context=sizes.max_pages * sizes.page_size)
    tokens, lru, slots, misses = jax.vmap(one)(
        residency.tokens, residency.lru, owned, wanted, seq_lens
    )
    rows = residency.buffer_rows_of(slots)
    targets = jnp.where(misses, rows, -1)
    return Planned(tokens, lru, rows, jnp.where(misses, sources, -1), targets)


def _swap_one(
    tokens: Int32[Array, " slots"],
    lru: Int32[Array, " size"],
    owned: Bool[Array, " slots"],
    wanted: Int32[Array, " n"],
    length: Int32[Array, ""],
    *,
    context: int,
) -> tuple[Array, Array, Array, Array]:
    """The LRU rule for one request: new tokens, new order, slots, and which positions to fetch."""
    size, n = lru.shape[0], wanted.shape[0]
    nowhere = jnp.int32(max(context, tokens.shape[0], n))
    named = jnp.where(wanted >= 0, wanted, nowhere)

    held = jnp.where(owned & (tokens >= 0), tokens, nowhere)
    slot = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    slot_of = jnp.full(context, -1, jnp.int32).at[held[:size]].set(slot[:size], mode="drop")
    slot_of = slot_of.at[held[size:]].set(slot[size:], mode="drop")
    found = slot_of.at[named].get(mode="fill", fill_value=-1)

    missing = (wanted >= 0) & (found < 0)
    place = jnp.arange(n, dtype=jnp.int32)
    first_of = jnp.full(context, n, jnp.int32).at[jnp.where(missing, named, nowhere)]
    first = first_of.min(place, mode="drop").at[named].get(mode="fill", fill_value=-1)
    is_first = missing & (first == place)
    nth_miss = jnp.cumsum(is_first, dtype=jnp.int32) - 1

    hit = jnp.zeros(size, bool).at[jnp.where(found >= 0, found, nowhere)].set(True, mode="drop")
    hit = hit[lru]
    evictable = ~hit & owned[lru]
    nth_evictable = jnp.cumsum(evictable, dtype=jnp.int32) - 1
    victims = jnp.full(size, -1, jnp.int32)
    victims = victims.at[jnp.where(evictable, nth_evictable, nowhere)].set(lru, mode="drop")
    victim = victims.at[jnp.where(missing, nth_miss[first], nowhere)].get(
        mode="fill", fill_value=-1
    )
    slots = jnp.where(missing, victim, found)

    fetched = is_first & (slots >= 0)
    new_tokens = tokens.at[jnp.where(fetched, slots, nowhere)].set(wanted, mode="drop")
    filled = evictable & (nth_evictable < jnp.sum(is_first, dtype=jnp.int32))
    # Misses took the evictable slots in LRU order, so the order of the misses is theirs.
    age = jnp.where(hit, 2, jnp.where(filled, 1, 0))
    new_lru = lru[jnp.argsort(age, stable=True)]
    direct = (length <= size) & jnp.all((wanted < 0) | (found == wanted))
    return new_tokens, jnp.where(direct, lru, new_lru), slots, fetched


def _existing(
    places: Array, table: Array, requests: Array | None, sizes: HiSparseSizes, num_pages: int
) -> Array:
    rows = paged_indices(places, table, page_size=sizes.page_size, requests=requests)
    return jnp.where(rows < num_pages * sizes.page_size, rows, -1)
