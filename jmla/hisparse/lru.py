"""The LRU rule of a device buffer: which slots a selection uses, and which rows must be fetched."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32

from jmla.hisparse.residency import Residency


class Planned(NamedTuple):
    """The arrays of a residency after a swap and of the swap, all int32 with a row per request."""

    tokens: Int32[Array, "requests slots"]
    lru: Int32[Array, "requests size"]
    slots: Int32[Array, "requests n"]
    sources: Int32[Array, "requests n"]
    targets: Int32[Array, "requests n"]


def plan_by_xla(
    residency: Residency, positions: Int[Array, "requests n"], seq_lens: Int[Array, " requests"]
) -> Planned:
    """`jmla.hisparse.plan_swap` of arguments that were checked."""
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
