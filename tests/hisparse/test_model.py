"""Random admissions, steps and releases, compared with plain Python after each."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jmla.cache import Cache, init_cache
from jmla.hisparse import (
    HiSparseCapacityError,
    HiSparsePool,
    HiSparseSizes,
    HiSparseState,
    admit,
    append,
    assign_pages,
    init_state,
    release,
    swap_in,
)
from jmla.hisparse.host_memory import read_rows
from jmla.layouts import KVLayout
from tests.hisparse.cases import latents_of
from tests.hisparse.oracle import Buffer

REQUESTS, LONGEST, PAGE, SIZE, NEWEST, TOPK = 3, 26, 4, 6, 2, 3
# Too few pages for three long requests, on the host and on the device.
SIZES = HiSparseSizes(
    requests=REQUESTS,
    max_length=LONGEST,
    page_size=PAGE,
    num_pages=15,
    num_buffer_pages=5,
    device_buffer_size=SIZE,
    newest=NEWEST,
)
PROMPT_PAGES = SIZES.max_pages
EVERYWHERE = jnp.tile(jnp.arange(SIZES.max_pages * PAGE, dtype=jnp.int32), (REQUESTS, 1))


@jax.jit
def step(
    state: HiSparseState, seq_lens: jax.Array, latents: jax.Array, positions: jax.Array
) -> tuple[HiSparseState, jax.Array, jax.Array]:
    """The step's tokens stored, and the selected slots with the values that lie there."""
    state, slots = swap_in(append(state, seq_lens, latents), positions, seq_lens)
    return state, slots, state.buffer_rows.gather(slots).dequantize()


@jax.jit
def stored(state: HiSparseState) -> jax.Array:
    slots = state.residency.host_slots(EVERYWHERE)
    return read_rows(state.host_rows, slots).dequantize()


@functools.cache
def prompt_cache() -> tuple[Cache, jax.Array]:
    pages = np.random.default_rng(0).permutation(PROMPT_PAGES).astype(np.int32)
    cache = init_cache(KVLayout.BF16, num_pages=PROMPT_PAGES, page_size=PAGE, rank=2, rope_dim=0)
    return cache, jnp.asarray(pages)


@jax.jit
def prefill_and_admit(
    state: HiSparseState, request: jax.Array, length: jax.Array, latents: jax.Array
) -> HiSparseState:
    cache, pages = prompt_cache()
    slots = (pages[:, None] * PAGE + jnp.arange(PAGE, dtype=jnp.int32)[None, :]).reshape(-1)
    rows = cache.rows.set(slots, cache.rows.encode(latents))
    return admit(state, request, length, Cache(rows), pages)


class Requests(RuleBasedStateMachine):
    """Some requests over too little memory."""

    def __init__(self) -> None:
        super().__init__()
        self.state = init_state(KVLayout.BF16, SIZES, rank=2, rope_dim=0)
        self.pool = HiSparsePool.empty(SIZES)
        self.buffers = [Buffer(SIZE, NEWEST) for _ in range(REQUESTS)]
        # The number of each request's tokens in order; None where the row is free.
        self.names: list[list[int] | None] = [None] * REQUESTS
        self.drafts = [0] * REQUESTS
        self.made = 0

    def new_names(self, count: int) -> list[int]:
        self.made += count
        return [(self.made - i) % 16384 for i in range(count)]

    def reserve(self, request: int, length: int) -> bool:
        """Whether there were pages for it; if not, nothing has changed."""
        before = self.pool
        needs = SIZES.pages_of(length) - len(before.owned[request])
        needs_buffer = SIZES.buffer_pages_of(length) - len(before.owned_buffer[request])
        enough = needs <= len(before.free) and needs_buffer <= len(before.free_buffer)
        try:
            self.pool = before.reserve(request, length)
        except HiSparseCapacityError:
            assert not enough and self.pool is before
            return False
        assert enough
        tables = (jnp.asarray(self.pool.page_table), jnp.asarray(self.pool.buffer_table))
        self.state = assign_pages(self.state, *tables)
        return True

    @precondition(lambda self: None in self.names)
    @rule(data=st.data(), length=st.integers(0, LONGEST))
    def admit(self, data, length):
        free = [request for request in range(REQUESTS) if self.names[request] is None]
        request = data.draw(st.sampled_from(free))
        if not self.reserve(request, length):
            return
        names = self.new_names(length)
        padded = np.full(PROMPT_PAGES * PAGE, 16383)
        padded[:length] = names
        where = jnp.int32(request), jnp.int32(length)
        self.state = prefill_and_admit(self.state, *where, latents_of(padded))
        self.buffers[request].admit(length)
        self.names[request], self.drafts[request] = names, 0

    @precondition(lambda self: any(names is not None for names in self.names))
    @rule(data=st.data(), count=st.integers(1, NEWEST))
    def step(self, data, count):
        seq_lens, new = [0] * REQUESTS, np.zeros((REQUESTS, count), int)
        for request, names in enumerate(self.names):
            if names is None or not data.draw(st.integers(0, 4), label="takes part"):
                continue
            rejected = data.draw(st.integers(0, self.drafts[request]), label="rejected")
            length = len(names) - rejected + count
            if length > LONGEST or not self.reserve(request, length):
                continue
            new[request] = self.new_names(count)
            self.names[request] = [*names[: length - count], *new[request].tolist()]
            self.drafts[request], seq_lens[request] = count - 1, length
        position = st.integers(-2, LONGEST + 2)
        drawn = st.lists(position, min_size=count * TOPK, max_size=count * TOPK)
        positions = [data.draw(drawn, label="positions") for _ in range(REQUESTS)]
        self.state, slots, values = step(
            self.state,
            jnp.asarray(seq_lens, jnp.int32),
            latents_of(new),
            jnp.asarray(positions, jnp.int32).reshape(REQUESTS, count, TOPK),
        )
        device_rows, read = [], []
        for request, length in enumerate(seq_lens):
            buffer, names = self.buffers[request], self.names[request] or []
            buffer.append(length, count)
            found = buffer.swap(positions[request], length)
            table = self.pool.owned_buffer[request]
            device_rows += [table[s // PAGE] * PAGE + s % PAGE if s >= 0 else -1 for s in found]
            wanted = zip(positions[request], found, strict=True)
            read += [names[p] if s >= 0 else 0 for p, s in wanted]
        np.testing.assert_array_equal(slots.reshape(-1), device_rows)
        np.testing.assert_array_equal(values, latents_of(np.reshape(read, slots.shape)))

    @precondition(lambda self: any(names is not None for names in self.names))
    @rule(data=st.data())
    def release(self, data):
        live = [request for request in range(REQUESTS) if self.names[request] is not None]
        request = data.draw(st.sampled_from(live))
        self.state = jax.jit(release)(self.state, jnp.int32(request))
        self.pool = self.pool.release(request)
        self.names[request] = None
        self.buffers[request].clear()
        # Reading it again is defined: there is nothing, and nothing changes.
        before = self.state
        again = jnp.zeros((REQUESTS, TOPK), jnp.int32)
        lens = jnp.where(jnp.arange(REQUESTS) == request, LONGEST, 0).astype(jnp.int32)
        self.state, slots = jax.jit(swap_in)(before, again, lens)
        assert (np.asarray(slots) == -1).all()

    @invariant()
    def buffers_agree(self):
        residency = self.state.residency
        np.testing.assert_array_equal(residency.tokens, [b.tokens for b in self.buffers])
        np.testing.assert_array_equal(residency.lru, [b.lru for b in self.buffers])
        np.testing.assert_array_equal(residency.page_table, self.pool.page_table)
        np.testing.assert_array_equal(residency.buffer_table, self.pool.buffer_table)

    @invariant()
    def no_row_is_lost(self):
        on_host = np.asarray(stored(self.state))
        for request, names in enumerate(self.names):
            if names:
                expected = latents_of(np.asarray(names))
                np.testing.assert_array_equal(on_host[request, : len(names)], expected)

    @invariant()
    def every_page_has_one_owner(self):
        for free, owned, total in [
            (self.pool.free, self.pool.owned, SIZES.num_pages),
            (self.pool.free_buffer, self.pool.owned_buffer, SIZES.num_buffer_pages),
        ]:
            pages = [*free, *(page for request in owned for page in request)]
            assert sorted(pages) == list(range(total))


TestRequests = Requests.TestCase
TestRequests.settings = hypothesis.settings(max_examples=40, stateful_step_count=40)


def test_a_seed_of_long_requests():
    """Hundreds of steps of drifting selections, where most positions are found again."""
    rng = np.random.default_rng(0)
    sizes = dataclasses.replace(SIZES, max_length=400, num_pages=300, num_buffer_pages=6)
    pool = HiSparsePool.empty(sizes)
    state = init_state(KVLayout.BF16, sizes, rank=2, rope_dim=0)
    for request in range(REQUESTS):
        pool = pool.reserve(request, 400)
    state = assign_pages(state, jnp.asarray(pool.page_table), jnp.asarray(pool.buffer_table))
    buffers = [Buffer(SIZE, NEWEST) for _ in range(REQUESTS)]
    hits = 0
    for length in range(1, 301):
        low = max(0, length - 9)
        positions = rng.integers(low, length, (REQUESTS, 1, TOPK))
        name = np.arange(REQUESTS)[:, None] * 400 + length - 1
        seq_lens = jnp.full(REQUESTS, length, jnp.int32)
        state, _, values = step(
            state, seq_lens, latents_of(name), jnp.asarray(positions, jnp.int32)
        )
        truth = np.arange(REQUESTS)[:, None, None] * 400 + positions
        np.testing.assert_array_equal(values, latents_of(truth))
        for request, buffer in enumerate(buffers):
            buffer.append(length, 1)
            buffer.swap(positions[request].reshape(-1).tolist(), length)
            hits += TOPK - len(buffer.fetched)
        np.testing.assert_array_equal(state.residency.tokens, [b.tokens for b in buffers])
        np.testing.assert_array_equal(state.residency.lru, [b.lru for b in buffers])
    assert REQUESTS * 300 < hits < REQUESTS * 300 * TOPK
