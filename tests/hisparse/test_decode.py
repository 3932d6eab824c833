"""Decode from a host-resident cache gives the bits of decode from a full cache, in each layout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.attention import sparse_decode
from jmla.cache import Cache
from jmla.cache import append as append_to_cache
from jmla.hisparse import (
    HiSparsePool,
    HiSparseSizes,
    HiSparseState,
    HostMemory,
    admit,
    append,
    assign_pages,
    init_state,
    plan_swap,
    replay,
)
from jmla.layouts import quantize_index_keys
from jmla.topk import paged_indices
from tests.hisparse.cases import INDEX_DIM, full_cache
from tests.layouts.cases import (
    FORMATS,
    RANK,
    ROPE_DIM,
    assert_same_rows,
    latents,
    quantized,
    u16,
)

HEADS, TOPK, STEPS = 2, 6, 40
WIDTH = RANK + ROPE_DIM
PROMPTS = (3, 13, 30)
"""Stays short for a while, crosses the buffer's 16 slots at once, has been long for a while."""


class Layer(NamedTuple):
    """The same tokens in both kinds of cache."""

    state: HiSparseState
    full: Cache


def sizes_of(s_q: int) -> HiSparseSizes:
    return HiSparseSizes(
        requests=len(PROMPTS),
        max_length=128,
        page_size=4,
        num_pages=96,
        num_buffer_pages=15,
        device_buffer_size=16,
        newest=s_q,
    )


def empty_state(name: str, sizes: HiSparseSizes, memory: HostMemory) -> HiSparseState:
    layout, options = FORMATS[name]
    return init_state(
        layout,
        sizes,
        rank=RANK,
        rope_dim=ROPE_DIM,
        index_dim=INDEX_DIM,
        host_memory=memory,
        **options,
    )


def prefilled(name: str, seed: int, sizes: HiSparseSizes, memory: HostMemory) -> Layer:
    """A layer whose requests have their prompts, admitted from the full cache."""
    pool = HiSparsePool.empty(sizes)
    for request in (1, 0, 2):
        pool = pool.reserve(request, 120)
    page_table = jnp.asarray(pool.page_table)
    full = full_cache(name, sizes.num_pages)
    state = empty_state(name, sizes, memory)
    state = assign_pages(state, page_table, jnp.asarray(pool.buffer_table))
    position = jnp.tile(jnp.arange(max(PROMPTS), dtype=jnp.int32), (len(PROMPTS), 1))
    lengths = jnp.asarray(PROMPTS, jnp.int32)
    slots = paged_indices(
        jnp.where(position < lengths[:, None], position, -1), page_table, page_size=4
    ).reshape(-1)
    prompts = latents(slots.size, seed=seed), latents(slots.size, seed=seed + 1, width=INDEX_DIM)
    full = jax.jit(append_to_cache)(full, slots, *prompts)
    for request, length in enumerate(lengths):
        state = jax.jit(admit)(state, jnp.int32(request), length, full, page_table[request])
    return Layer(state, full)


def decode_both(
    layer: Layer, slots: jax.Array, positions: jax.Array, seq_lens: jax.Array, q: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    requests = positions.shape[0]
    flat = jnp.where(positions < seq_lens[:, None, None], positions, -1).reshape(requests, -1)
    full_slots = paged_indices(flat, layer.state.residency.page_table, page_size=4)
    attend = functools.partial(sparse_decode, sm_scale=0.01, implementation="xla")
    ours = attend(q, layer.state.buffer_rows, slots)
    return ours, attend(q, layer.full.rows, full_slots.reshape(positions.shape))


def append_both(layer: Layer, seq_lens: jax.Array, new: jax.Array, keys: jax.Array) -> Layer:
    s_q = new.shape[1]
    position = seq_lens[:, None] - s_q + jnp.arange(s_q, dtype=jnp.int32)[None, :]
    slots = paged_indices(position, layer.state.residency.page_table, page_size=4)
    tokens = slots.reshape(-1), new.reshape(-1, WIDTH), keys.reshape(-1, INDEX_DIM)
    return Layer(append(layer.state, seq_lens, new, keys), append_to_cache(layer.full, *tokens))


@functools.partial(jax.jit, static_argnames="s_q", donate_argnames="layers")
def run(layers: tuple[Layer, Layer], key: jax.Array, *, s_q: int):
    """STEPS steps of an anchor layer and one that reuses its selection; the program's outputs."""
    requests = len(PROMPTS)

    def step(carry, key):
        (anchor, follower), lengths = carry
        draws = jax.random.split(key, 6)
        # Some rows are idle for a step; of the drafts, one is rejected now and then.
        idle = jax.random.bernoulli(draws[0], 0.1, (requests,))
        rejected = jax.random.bernoulli(draws[1], 0.3, (requests,)) & (s_q > 1)
        after = lengths - rejected.astype(jnp.int32) + s_q
        seq_lens = jnp.where(idle, 0, after)
        new = jax.random.normal(draws[2], (2, requests, s_q, WIDTH), jnp.bfloat16)
        keys = jax.random.normal(draws[3], (2, requests, s_q, INDEX_DIM), jnp.bfloat16)
        # Mostly recent positions; -1 and positions past the end among them.
        back = jax.random.exponential(draws[4], (requests, s_q, TOPK)) * 8.0
        positions = jnp.maximum(seq_lens[:, None, None] - back.astype(jnp.int32), -1)
        q = jax.random.normal(draws[5], (requests, s_q, HEADS, WIDTH), jnp.bfloat16)

        anchor = append_both(anchor, seq_lens, new[0], keys[0])
        residency, swap = plan_swap(anchor.state.residency, positions, seq_lens)
        anchor = anchor._replace(state=replay(anchor.state, residency, swap))
        outs = decode_both(anchor, swap.slots, positions, seq_lens, q)
        follower = append_both(follower, seq_lens, new[1], keys[1])
        follower = follower._replace(state=replay(follower.state, residency, swap))
        outs_2 = decode_both(follower, swap.slots, positions, seq_lens, q)
        misses = jnp.sum(swap.sources >= 0)
        return ((anchor, follower), jnp.where(idle, lengths, after)), (outs, outs_2, misses)

    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(step, (layers, jnp.asarray(PROMPTS, jnp.int32)), keys)


@pytest.mark.parametrize(
    ("name", "s_q", "memory"),
    [
        *((name, 1, "device") for name in FORMATS),
        ("pow2", 2, "device"),
        ("bf16", 1, "pinned_host"),
        ("fp4", 2, "pinned_host"),
    ],
)
def test_decode_has_the_bits_of_the_full_cache(name, s_q, memory):
    sizes = sizes_of(s_q)
    layers = tuple(prefilled(name, seed, sizes, memory) for seed in (0, 20))
    (layers, lengths), (*pairs, misses) = run(layers, jax.random.key(1), s_q=s_q)
    for (out, lse), (full_out, full_lse) in pairs:
        np.testing.assert_array_equal(u16(out), u16(full_out))
        np.testing.assert_array_equal(lse, full_lse)
        assert np.isfinite(lse).any(axis=(1, 2, 3)).all()
    assert misses.sum() > STEPS and (lengths > sizes.device_buffer_size).all()
    for state, full in layers:
        assert jax.typeof(jax.tree.leaves(state.host_rows)[0]).memory_space == (
            jax.memory.Space.Host if memory == "pinned_host" else jax.memory.Space.Device
        )
        assert_same_rows(jax.device_put(state.host_rows, jax.memory.Space.Device), full.rows)
        assert_same_rows(state.index_keys, full.index_keys)


def test_index_keys_are_those_of_the_tokens():
    sizes = sizes_of(1)
    state = prefilled("bf16", 0, sizes, "device").state
    keys = latents(3, 1, seed=5, width=INDEX_DIM)
    seq_lens = jnp.asarray(PROMPTS, jnp.int32) + 1
    state = jax.jit(append)(state, seq_lens, latents(3, 1, seed=4), keys)
    assert state.index_keys is not None
    for request, length in enumerate(PROMPTS):
        slot = state.residency.host_slots(jnp.full((3, 1), length, jnp.int32))[request]
        assert_same_rows(state.index_keys.gather(slot), quantize_index_keys(keys[request]))
        new = quantized(latents(3, 1, seed=4)[request], FORMATS["bf16"][0])
        assert_same_rows(state.host_rows.gather(slot), new)
