"""Edges of a request's life, what is refused, and where the rows are."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.hisparse import (
    HiSparseCapacityError,
    HiSparsePool,
    HiSparseSizes,
    HiSparseState,
    admit,
    append,
    assign_pages,
    init_state,
    plan_swap,
    release,
    replay,
    swap_in,
)
from jmla.hisparse.host_memory import place_rows, read_rows, write_rows
from jmla.layouts import KVLayout
from tests.hisparse.cases import INDEX_DIM, full_cache, latents_of
from tests.layouts.cases import FORMATS, RANK, ROPE_DIM, assert_same_rows, latents, small_rows

SIZES = HiSparseSizes(
    requests=2,
    max_length=24,
    page_size=4,
    num_pages=12,
    num_buffer_pages=4,
    device_buffer_size=6,
    newest=2,
)


def small_state(**changes: int) -> tuple[HiSparseState, HiSparsePool]:
    """A state of tiny rows in which both requests own all that they may."""
    sizes = dataclasses.replace(SIZES, **changes)
    pool = HiSparsePool.empty(sizes).reserve(0, 24).reserve(1, 24)
    state = init_state(KVLayout.BF16, sizes, rank=2, rope_dim=0)
    tables = jnp.asarray(pool.page_table), jnp.asarray(pool.buffer_table)
    return assign_pages(state, *tables), pool


def extend(state: HiSparseState, length: int, names: list[int]) -> HiSparseState:
    """Request 0 grows to `length` by tokens of these numbers; request 1 is idle."""
    rows = latents_of(np.asarray([names, names]))
    return jax.jit(append)(state, jnp.asarray([length, 0], jnp.int32), rows)


def read(
    state: HiSparseState, positions: list[int], length: int
) -> tuple[HiSparseState, list[int]]:
    """The state after a swap of request 0, and the numbers of the tokens read."""
    wanted = jnp.asarray([positions, [-1] * len(positions)], jnp.int32)
    state, slots = jax.jit(swap_in)(state, wanted, jnp.asarray([length, 0], jnp.int32))
    values = np.asarray(state.buffer_rows.gather(slots[0]).dequantize(), np.int64)
    return state, (values @ [128, 1]).tolist()


def test_a_rejected_draft_is_never_read_again():
    """Its slot of the short request is stale once the request, grown long, leaves it behind."""
    state, _ = small_state()
    for length in (2, 4, 6):
        state = extend(state, length, [length - 2, length - 1])
    # Position 5 is rejected, and written anew into a reserved slot.
    state = extend(state, 7, [105, 6])
    state, names = read(state, [4, 5, 6], 7)
    assert names == [4, 105, 6]
    state = extend(state, 9, [7, 8])
    state, names = read(state, [5, 4, 8, 6], 9)
    assert names == [105, 4, 8, 6]


def test_a_long_request_that_rejections_make_short_again_keeps_its_rows():
    state, _ = small_state()
    for length in (2, 4, 6):
        state = extend(state, length, [length - 2, length - 1])
    state = extend(state, 7, [105, 6])
    # The whole buffer is in use for other tokens, none in the slot of its position.
    state, names = read(state, [6, 5, 4, 3], 7)
    assert names == [6, 105, 4, 3]
    state = extend(state, 6, [205])
    before = state.residency.lru[0].tolist()
    state, names = read(state, [5, 4, 3, 2, 1, 0], 6)
    assert names == [205, 4, 3, 2, 1, 0]
    assert state.residency.lru[0].tolist() == before


def test_released_rows_are_gone_and_their_pages_serve_another_request():
    state, pool = small_state()
    state = extend(state, 2, [11, 12])
    state = jax.jit(release)(state, jnp.int32(0))
    state, slots = swap_in(state, jnp.zeros((2, 1), jnp.int32), jnp.asarray([2, 0], jnp.int32))
    assert slots.tolist() == [[-1], [-1]]
    # Tokens without pages are dropped, and nothing of the other request is touched.
    after = extend(state, 2, [21, 22])
    assert_same_rows(after.host_rows, state.host_rows)
    assert_same_rows(after.buffer_rows, state.buffer_rows)
    pool = pool.release(0).reserve(0, 3)
    state = assign_pages(state, jnp.asarray(pool.page_table), jnp.asarray(pool.buffer_table))
    assert read(extend(state, 2, [31, 32]), [1, 0, -1], 2)[1] == [32, 31, 0]


@pytest.mark.parametrize("request_", [-1, 2, 2**31 - 1])
def test_a_request_that_is_none_changes_nothing(request_):
    state, _ = small_state()
    state = extend(state, 2, [11, 12])
    assert_same_rows(jax.jit(release)(state, jnp.int32(request_)), state)


def test_the_pool_says_what_is_missing_and_stays_as_it_was():
    pool = HiSparsePool.empty(dataclasses.replace(SIZES, num_buffer_pages=3, num_pages=7))
    pool = pool.reserve(0, 24)
    assert pool.page_table.tolist() == [[0, 1, 2, 3, 4, 5], [-1] * 6]
    assert pool.buffer_table.tolist() == [[0, 1], [-1] * 2]
    with pytest.raises(HiSparseCapacityError) as error:
        pool.reserve(1, 7)
    assert "2 more of sizes.num_pages=7 with 1 free" in str(error.value)
    assert "2 more of sizes.num_buffer_pages=3 with 1 free" in str(error.value)
    pool = pool.reserve(1, 4)
    assert pool.reserve(1, 2) == pool
    assert pool.buffer_table.tolist() == [[0, 1], [2, -1]]
    assert pool.release(0).reserve(1, 7).page_table[1].tolist() == [6, 0, -1, -1, -1, -1]
    for arguments, message in [((2, 1), "request=2: expected 0 to 1"), ((0, 25), "length=25")]:
        with pytest.raises(ValueError, match=message):
            pool.reserve(*arguments)
    with pytest.raises(ValueError, match="request=-1"):
        pool.release(-1)


@pytest.mark.parametrize("name", FORMATS)
def test_pinned_host_rows_are_read_and_written_as_plain_ones(name):
    plain = small_rows(name, 3, 4)
    pinned = place_rows(plain, "pinned_host")
    slots = jnp.asarray([[0, 11, -1], [12, 5, 5], [-(2**31), 2**31 - 1, 3]], jnp.int32)
    assert_same_rows(jax.jit(read_rows)(pinned, slots), plain.gather(slots))
    slots = slots.at[1, 1].set(-2)  # of two writes to one slot, any may win
    new = small_rows(name, 3, 3, seed=1)
    written = jax.jit(write_rows)(pinned, slots, new)
    assert_same_rows(jax.device_put(written, jax.memory.Space.Device), plain.set(slots, new))


def test_sizes_in_bytes():
    state = init_state(KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, SIZES, index_dim=128)
    assert state.host_bytes == 48 * 656
    tables = 4 * 2 * (6 + 2 + 8 + 6)
    assert state.device_bytes == 16 * 656 + 48 * 132 + tables


def test_a_donated_state_is_updated_in_place():
    state = init_state(KVLayout.BF16, dataclasses.replace(SIZES, num_pages=512))
    lens, new = jnp.zeros(2, jnp.int32), jnp.zeros((2, 1, 576), jnp.bfloat16)

    def step(state: HiSparseState) -> HiSparseState:
        return swap_in(append(state, lens, new), jnp.zeros((2, 3), jnp.int32), lens)[0]

    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
    assert aliased >= state.host_bytes + state.device_bytes // 2
    temporary = memory.temp_size_in_bytes + memory.host_temp_size_in_bytes
    assert temporary <= state.host_bytes // 8


def test_wrong_arguments_say_what_was_expected():
    state, _ = small_state()
    lens, new = jnp.zeros(2, jnp.int32), jnp.zeros((2, 1, 2), jnp.bfloat16)
    keyed = init_state(KVLayout.BF16, SIZES, rank=RANK, rope_dim=ROPE_DIM, index_dim=INDEX_DIM)
    wide = latents(2, 1)
    one, pages = jnp.int32(1), jnp.zeros(2, jnp.int32)
    bf16, fp8 = full_cache("bf16", 2), full_cache("fp8", 2)
    other = small_state(newest=1)[0]
    residency, swap = plan_swap(other.residency, jnp.zeros((2, 1), jnp.int32), lens)
    cases: list[tuple[Callable[..., object], tuple[object, ...], str]] = [
        (append, (state, lens[:1], new), r"seq_lens: got int32\[1\]"),
        (append, (state, lens, new[0]), r"expected \[2, s_q, 2\]"),
        (
            append,
            (state, lens, jnp.zeros((2, 3, 2), jnp.bfloat16)),
            r"expected 1 to sizes.newest=2",
        ),
        (append, (state, lens, new[:, :0]), "0 new tokens"),
        (append, (state, lens, new[..., :1]), "last axis of 2"),
        (append, (state, lens, new, new), "the state has no index keys"),
        (append, (keyed, lens, wide), "the state has index keys of 32 values"),
        (admit, (state, one, one, bf16, pages), "cache.rows are"),
        (admit, (keyed, one, one, fp8, pages), "cache.rows are"),
        (admit, (keyed, one, one, dataclasses.replace(bf16, index_keys=None), pages), "index_keys"),
        (admit, (keyed, pages, one, bf16, pages), r"request: got int32\[2\]"),
        (admit, (keyed, one, jnp.float32(1), bf16, pages), "length: got float32"),
        (admit, (keyed, one, one, bf16, one), r"cache_pages.shape=\(\)"),
        (release, (state, pages), r"request: got int32\[2\]"),
        (replay, (state, residency, swap), "same sizes"),
        (assign_pages, (state, pages, pages), r"page_table: got int32\[2\]"),
    ]
    for call, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match="memory='hbm': expected 'pinned_host' or 'device'"):
        init_state(KVLayout.BF16, SIZES, host_memory="hbm")  # type: ignore[arg-type]
