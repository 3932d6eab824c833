"""The kernels of host-resident caches on a Hopper: bits of the jnp path, in place, and decode."""

import dataclasses
import functools
import os
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla.cache import append as append_to_cache
from jmla.cache import init_cache
from jmla.hisparse import (
    HiSparseCapacityError,
    HiSparsePool,
    HiSparseSizes,
    HiSparseState,
    Residency,
    admit,
    append,
    assign_pages,
    init_state,
    plan_swap,
    release,
    swap_in,
)
from jmla.layouts import KVLayout
from jmla.topk import paged_indices
from tests.hisparse.oracle import Buffer
from tests.hisparse.residencies import random_residency, random_selection
from tests.layouts.cases import FORMATS, assert_same_rows, small_rows

pytestmark = pytest.mark.usefixtures("hopper")


@functools.partial(jax.jit, static_argnames="implementation")
def plan(residency: Residency, positions: jax.Array, lens: jax.Array, *, implementation: Any):
    return plan_swap(residency, positions, lens, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def swap(state: HiSparseState, positions: jax.Array, lens: jax.Array, *, implementation: Any):
    return swap_in(state, positions, lens, implementation=implementation)


def sizes_of(requests: int, size: int, newest: int, context: int, page: int) -> HiSparseSizes:
    pages, buffer_pages = -(-context // page), -(-(size + newest) // page)
    return HiSparseSizes(
        requests=requests,
        max_length=context,
        page_size=page,
        num_pages=requests * pages + 3,
        num_buffer_pages=requests * buffer_pages + 2,
        device_buffer_size=size,
        newest=newest,
    )


def check_steps(seed: int, sizes: HiSparseSizes, n: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    residency, lengths = random_residency(rng, sizes)
    lens = jnp.asarray(lengths)
    empty = init_state(KVLayout.BF16, sizes, rank=2, rope_dim=0, host_memory="device")
    host_rows, buffer_rows = (
        rows.map_tokens(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype))
        for rows in (empty.host_rows, empty.buffer_rows)
    )
    state = HiSparseState(host_rows, buffer_rows, residency)
    for _ in range(steps):
        positions = jnp.asarray(random_selection(rng, state.residency, lengths, n))
        given = state.residency, positions, lens
        after, asked = plan(*given, implementation="mosaic_gpu")
        assert_same_rows((after, asked), plan(*given, implementation="xla"))
        expected = swap(state, positions, lens, implementation="xla")
        state, slots = swap(state, positions, lens, implementation="mosaic_gpu")
        assert_same_rows((state, slots), expected)


@pytest.mark.parametrize(
    ("requests", "n", "size", "newest", "context", "page"),
    [
        (16, 2048, 4096, 1, 1 << 17, 64),
        (8, 4096, 4096, 2, 100_000, 64),
        (4, 6144, 6144, 3, 1 << 19, 64),
        (8, 8192, 16384, 4, 1 << 17, 64),
        (2, 16384, 16384, 1, 1 << 17, 64),
        (5, 7001, 9005, 3, 50_021, 16),
        (5, 777, 1001, 3, 20_011, 16),
        (3, 2, 6, 2, 40, 4),
        (300, 33, 70, 1, 700, 1),
    ],
)
def test_swaps_of_any_size(requests: int, n: int, size: int, newest: int, context: int, page: int):
    check_steps(0, sizes_of(requests, size, newest, context, page), n, 5)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.integers(0, 2**31))
def test_random_swaps(seed: int):
    check_steps(seed, sizes_of(4, 150, 3, 1500, 16), 64, 3)


@pytest.mark.parametrize("memory", ["pinned_host", "device"])
@pytest.mark.parametrize("name", FORMATS)
def test_new_tokens_and_fetched_rows_are_those_of_xla(name: str, memory: Any):
    layout, options = FORMATS[name]
    sizes = sizes_of(4, 150, 2, 1500, 16)
    rng = np.random.default_rng(1)
    residency, lengths = random_residency(rng, sizes)
    positions = jnp.asarray(random_selection(rng, residency, lengths, 64))
    rows = small_rows(name, sizes.num_pages, 16)
    buffer_rows = small_rows(name, sizes.num_buffer_pages, 16, seed=1)
    state = init_state(
        layout, sizes, rank=rows.rank, rope_dim=rows.rope_dim, host_memory=memory, **options
    )
    host = state.host_rows.map_tokens(lambda old, new: jax.device_put(new, old.sharding), rows)
    state = HiSparseState(host, buffer_rows, residency)
    new = jax.random.normal(jax.random.key(0), (4, 2, rows.width), jnp.bfloat16)
    lens = jnp.asarray(lengths)

    @functools.partial(jax.jit, static_argnums=1)
    def step(state: HiSparseState, implementation: Any) -> tuple[HiSparseState, jax.Array]:
        state = append(state, lens, new, implementation=implementation)
        return swap_in(state, positions, lens, implementation=implementation)

    def bits(implementation: Any) -> Any:
        after, slots = step(state, implementation)
        held = jax.device_put(after.host_rows, jax.memory.Space.Device)
        return held, after.buffer_rows, after.residency, slots

    assert_same_rows(bits("mosaic_gpu"), bits("xla"))
    assert_same_rows(jax.device_put(state.host_rows, jax.memory.Space.Device), rows)


@pytest.mark.parametrize("name", ["bf16", "pow2", "v4"])
def test_host_rows_stay_where_they_are(name: str):
    """Steps in a loop and an admission write them in place, and nothing is copied on the way."""
    layout, options = FORMATS[name]
    sizes = sizes_of(2, 256, 1, 4096, 64)
    state = init_state(layout, sizes, index_dim=128, **options)
    cache = init_cache(layout, num_pages=64, index_dim=128, **options)
    new = jnp.ones((2, 1, cache.rows.width), jnp.bfloat16), jnp.ones((2, 1, 128), jnp.bfloat16)
    positions = jnp.zeros((2, 256), jnp.int32)

    def steps(state: HiSparseState, cache: Any) -> HiSparseState:
        pages = jnp.arange(64, dtype=jnp.int32)
        state = admit(state, jnp.int32(1), jnp.int32(4000), cache, pages)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            state, lens = carry
            state, _slots = swap_in(append(state, lens, *new), positions, lens)
            return (state, lens + 1), None

        lens = jnp.full(2, 4001, jnp.int32)
        return jax.lax.scan(step, (state, lens), None, length=3)[0][0]

    program = jax.jit(steps, donate_argnums=0).lower(state, cache).compile()
    memory = program.memory_analysis()
    assert memory is not None
    # What a format counts as padding is in no array.
    on_host = sum(leaf.nbytes for leaf in jax.tree.leaves(state.host_rows))
    assert memory.host_alias_size_in_bytes >= on_host
    assert memory.host_temp_size_in_bytes == 0
    assert memory.temp_size_in_bytes < state.host_bytes // 8
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.host_rows)]
    after = program(state, cache)
    assert before == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.host_rows)]


REQUESTS, CONTEXT, SIZE, TOPK, HEADS = 4, 1024, 128, 64, 16
TABLE = np.arange(REQUESTS * CONTEXT // 64, dtype=np.int32).reshape(REQUESTS, -1)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def decode_both(
    state: HiSparseState, full: Any, lens: jax.Array, key: jax.Array, positions: jax.Array
) -> tuple[HiSparseState, Any, jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    keys, width = jax.random.split(key, 3), full.rows.width
    latents, index_keys = (
        jax.random.normal(key, (REQUESTS, size), jnp.bfloat16)
        for key, size in zip(keys, (width, 128), strict=False)
    )
    q = jax.random.normal(keys[2], (REQUESTS, 1, HEADS, width), jnp.bfloat16)
    table = jnp.asarray(TABLE)
    own = paged_indices(lens[:, None] - 1, table, page_size=64)
    full = append_to_cache(full, own[:, 0], latents, index_keys)
    state = append(state, lens, latents[:, None], index_keys[:, None])
    state, slots = swap_in(state, positions, lens)
    attend = functools.partial(jmla.sparse_decode, sm_scale=0.05)
    visible = jnp.where(positions < lens[:, None], positions, -1)
    full_slots = paged_indices(visible, table, page_size=64)
    ours = attend(q, state.buffer_rows, slots[:, None])
    return state, full, slots, ours, attend(q, full.rows, full_slots[:, None])


@functools.partial(jax.jit, donate_argnums=0)
def prefill(full: Any, request: jax.Array, length: jax.Array, key: jax.Array) -> Any:
    position = jnp.arange(CONTEXT, dtype=jnp.int32)
    stored = jnp.where(position < length, position, -1)[None]
    slots = paged_indices(stored, jnp.asarray(TABLE), page_size=64, requests=request[None])[0]
    latents, index_keys = (
        jax.random.normal(each, (CONTEXT, size), jnp.bfloat16)
        for each, size in zip(jax.random.split(key), (full.rows.width, 128), strict=True)
    )
    return append_to_cache(full, slots, latents, index_keys)


def reads_nothing(state: HiSparseState, request: int) -> bool:
    """Whether a selection of a released request finds nothing, and changes nothing."""
    positions = jnp.tile(jnp.arange(TOPK, dtype=jnp.int32), (REQUESTS, 1))
    lens = jnp.where(jnp.arange(REQUESTS) == request, CONTEXT, 0).astype(jnp.int32)
    after, swap = plan(state.residency, positions, lens, implementation="mosaic_gpu")
    assert_same_rows(after, state.residency)
    return all((np.asarray(each) == -1).all() for each in jax.tree.leaves(swap))


@pytest.mark.parametrize("name", FORMATS)
def test_decode_has_the_bits_of_the_full_cache(name: str):
    """Hundreds of steps from pinned rows, in which requests come, grow, rest and go.

    There are too few pages for all of them, and buffers hold what plain Python says.
    """
    layout, options = FORMATS[name]
    rng = np.random.default_rng(0)
    sizes = sizes_of(REQUESTS, SIZE, 1, CONTEXT, 64)
    sizes = dataclasses.replace(sizes, num_pages=40, num_buffer_pages=10)
    pool = assigned = HiSparsePool.empty(sizes)
    buffers = [Buffer(SIZE, 1) for _ in range(REQUESTS)]
    state = init_state(layout, sizes, index_dim=128, **options)
    full = init_cache(layout, num_pages=TABLE.size, index_dim=128, **options)
    move, leave = jax.jit(admit, donate_argnums=0), jax.jit(release, donate_argnums=0)
    lengths, fetched, refused = [0] * REQUESTS, 0, 0
    for number in range(300):
        key = jax.random.key(number)
        request = int(rng.integers(REQUESTS))
        if lengths[request] and rng.random() < 0.04:
            state = leave(state, jnp.int32(request))
            pool, lengths[request] = pool.release(request), 0
            buffers[request].clear()
            assert reads_nothing(state, request)
        elif not lengths[request]:
            length = int(rng.integers(1, 900))
            try:
                pool = pool.reserve(request, length)
            except HiSparseCapacityError:
                refused += 1
                continue
            tables = jnp.asarray(pool.page_table), jnp.asarray(pool.buffer_table)
            state = assign_pages(state, *tables)
            full = prefill(full, jnp.int32(request), jnp.int32(length), key)
            pages = jnp.asarray(TABLE[request])
            state = move(state, jnp.int32(request), jnp.int32(length), full, pages)
            lengths[request] = length
            buffers[request].admit(length)
        now = np.zeros(REQUESTS, np.int32)
        for each, length in enumerate(lengths):
            if not 0 < length < CONTEXT or rng.random() < 0.1:
                continue
            try:
                pool = pool.reserve(each, length + 1)
            except HiSparseCapacityError:
                refused += 1
                continue
            now[each] = lengths[each] = length + 1
        if pool is not assigned:
            tables = jnp.asarray(pool.page_table), jnp.asarray(pool.buffer_table)
            state, assigned = assign_pages(state, *tables), pool
        near = now[:, None] - 1 - rng.integers(0, 200, (REQUESTS, TOPK))
        far = rng.integers(-1, np.maximum(now, 1)[:, None] + 5, (REQUESTS, TOPK))
        positions = np.where(rng.random((REQUESTS, TOPK)) < 0.8, near, far).astype(np.int32)
        state, full, slots, ours, theirs = decode_both(
            state, full, jnp.asarray(now), key, jnp.asarray(positions)
        )
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(
                np.asarray(mine).view(np.uint8), np.asarray(other).view(np.uint8)
            )
        found = np.full((REQUESTS, TOPK), -1)
        for each, buffer in enumerate(buffers):
            buffer.append(int(now[each]), 1)
            owned = np.asarray(pool.owned_buffer[each], int)
            slot = np.asarray(buffer.swap(positions[each].tolist(), int(now[each])))
            if owned.size:
                found[each] = np.where(slot < 0, -1, owned[slot // 64] * 64 + slot % 64)
            fetched += len(buffer.fetched)
        np.testing.assert_array_equal(slots, found)
        np.testing.assert_array_equal(state.residency.tokens, [b.tokens for b in buffers])
        np.testing.assert_array_equal(state.residency.lru, [b.lru for b in buffers])
    assert fetched > 1000 and refused > 10


def test_too_much_host_memory_is_refused_and_nothing_is_lost():
    sizes = sizes_of(2, SIZE, 1, CONTEXT, 64)
    before = init_state(KVLayout.BF16, sizes, index_dim=128)
    limit = int(os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "64"))
    pages = ((limit << 30) + (1 << 30)) // (1152 * 64)
    with pytest.raises(MemoryError, match="fewer pages, or raise XLA_PJRT_GPU_HOST_MEMORY_LIMIT"):
        init_state(KVLayout.BF16, dataclasses.replace(sizes, num_pages=pages))
    after = init_state(KVLayout.BF16, sizes, index_dim=128)
    assert_same_rows(*(jax.device_put(s, jax.memory.Space.Device) for s in (before, after)))
