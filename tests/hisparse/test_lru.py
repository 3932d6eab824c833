"""The LRU rule: known cases, then random residencies against the plain-Python oracle."""

import dataclasses
from collections.abc import Sequence

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.hisparse import HiSparseSizes, Residency, Swap, plan_swap
from tests.hisparse.oracle import Buffer

SIZE, PAGE, LONGEST = 6, 4, 40
SIZES = HiSparseSizes(
    requests=2,
    max_length=LONGEST,
    page_size=PAGE,
    num_pages=20,
    num_buffer_pages=4,
    device_buffer_size=SIZE,
    newest=2,
)
plan = jax.jit(plan_swap)


def residency_of(*buffers: Buffer) -> Residency:
    """Each buffer as a request that owns all it may: pages in descending order."""
    pages = np.arange(SIZES.num_pages, dtype=np.int32)[::-1].reshape(2, -1)
    buffer_pages = np.arange(SIZES.num_buffer_pages, dtype=np.int32)[::-1].reshape(2, -1)
    return Residency(
        jnp.asarray(pages),
        jnp.asarray(buffer_pages),
        jnp.asarray([buffer.tokens for buffer in buffers], jnp.int32),
        jnp.asarray([buffer.lru for buffer in buffers], jnp.int32),
        SIZES,
    )


def rows_of(table: jax.Array, request: int, places: Sequence[int]) -> list[int]:
    return [int(table[request, p // PAGE]) * PAGE + p % PAGE if p >= 0 else -1 for p in places]


def check(
    before: Residency, after: Residency, swap: Swap, buffers: list[Buffer], slots: list[list[int]]
) -> None:
    """The arrays after a swap say what the oracle says."""
    np.testing.assert_array_equal(after.tokens, [buffer.tokens for buffer in buffers])
    np.testing.assert_array_equal(after.lru, [buffer.lru for buffer in buffers])
    for request, buffer in enumerate(buffers):
        expected = rows_of(before.buffer_table, request, slots[request])
        np.testing.assert_array_equal(swap.slots[request].reshape(-1), expected)
        sources, targets = np.asarray(swap.sources[request]), np.asarray(swap.targets[request])
        np.testing.assert_array_equal(targets >= 0, sources >= 0)
        fetched = buffer.fetched
        np.testing.assert_array_equal(
            targets[targets >= 0], rows_of(before.buffer_table, request, [s for s, _ in fetched])
        )
        np.testing.assert_array_equal(
            sources[sources >= 0], rows_of(before.page_table, request, [p for _, p in fetched])
        )


def one(tokens: list[int], lru: list[int], wanted: list[int], length: int) -> tuple[list, ...]:
    """Tokens, LRU order, buffer slots and fetched positions after a swap of request 0."""
    buffer = Buffer(SIZE, 2)
    buffer.tokens, buffer.lru = tokens, lru
    before = residency_of(buffer, Buffer(SIZE, 2))
    positions = jnp.asarray([wanted, [-1] * len(wanted)], jnp.int32)
    after, swap = plan(before, positions, jnp.asarray([length, 0], jnp.int32))
    slot_of_row = {row: s for s, row in enumerate(rows_of(before.buffer_table, 0, range(8)))}
    position_of = {row: p for p, row in enumerate(rows_of(before.page_table, 0, range(LONGEST)))}
    return (
        after.tokens[0].tolist(),
        after.lru[0].tolist(),
        [slot_of_row.get(row, -1) for row in swap.slots[0].tolist()],
        [position_of[row] for row in swap.sources[0].tolist() if row >= 0],
    )


def test_misses_take_the_oldest_and_hits_become_the_newest():
    # Slots 0..5 hold 0..5, slot 2 oldest; 4 and 0 hit, 20 and 10 miss into slots 2 and 3.
    after = one([0, 1, 2, 3, 4, 5, 30, -1], [2, 3, 0, 1, 4, 5], [4, 20, 0, 10], 31)
    assert after == ([0, 1, 20, 10, 4, 5, 30, -1], [1, 5, 2, 3, 0, 4], [4, 2, 0, 3], [20, 10])


def test_the_newest_token_is_in_its_reserved_slot_and_not_in_the_order():
    after = one([0, 1, 2, 3, 4, 5, 30, -1], [0, 1, 2, 3, 4, 5], [30, 5], 31)
    assert after == ([0, 1, 2, 3, 4, 5, 30, -1], [0, 1, 2, 3, 4, 5], [6, 5], [])


def test_an_empty_slot_is_evictable_in_its_place_and_not_before():
    after = one([0, 1, -1, 3, 4, 5, 30, -1], [0, 1, 2, 3, 4, 5], [20, 1], 31)
    assert after == ([20, 1, -1, 3, 4, 5, 30, -1], [2, 3, 4, 5, 0, 1], [0, 1], [20])


def test_duplicates_get_one_slot():
    after = one([0, 1, 2, 3, 4, 5, 30, 29], [0, 1, 2, 3, 4, 5], [9, 5, 9, 5, 30, 30], 31)
    assert after[1:] == ([1, 2, 3, 4, 0, 5], [0, 5, 0, 5, 6, 6], [9])


@pytest.mark.parametrize("bad", [-1, -(2**31), 31, LONGEST, 2**31 - 1])
def test_what_is_no_position_gives_minus_one_anywhere(bad):
    tokens, lru = [0, 1, 2, 3, 4, 5, 30, -1], [0, 1, 2, 3, 4, 5]
    after = one(tokens, lru, [bad, 7, bad, 2, bad], 31)
    assert after[1:] == ([1, 3, 4, 5, 0, 2], [-1, 0, -1, 2, -1], [7])


def test_the_longest_short_request_is_looked_up_and_one_more_token_is_not():
    tokens, lru = [0, 1, 2, 3, 4, 5, -1, -1], [5, 4, 3, 2, 1, 0]
    assert one(tokens, lru, [5, -1, 1, 6, 1], 6) == (tokens, lru, [5, -1, 1, -1, 1], [])
    tokens = [0, 1, 2, 3, 4, 5, 6, -1]
    assert one(tokens, lru, [5, -1, 1, 6, 1], 7)[1:] == ([4, 3, 2, 0, 5, 1], [5, -1, 1, 6, 1], [])


def test_a_whole_new_selection_replaces_the_whole_buffer():
    after = one([0, 1, 2, 3, 4, 5, 30, -1], [5, 0, 4, 1, 3, 2], [10, 11, 12, 13, 14, 15], 31)
    assert after[:2] == ([11, 13, 15, 14, 12, 10, 30, -1], [5, 0, 4, 1, 3, 2])


lengths = st.one_of(st.sampled_from([0, 1, SIZE - 1, SIZE, SIZE + 1]), st.integers(0, LONGEST))


@st.composite
def buffers(draw):
    """A buffer that may be: distinct positions, or none, in its slots, and its request's length."""
    length = draw(lengths)
    buffer = Buffer(SIZE, 2)
    held = draw(st.permutations(range(max(length, SIZE + 2))))[: SIZE + 2]
    kept = draw(st.lists(st.booleans(), min_size=SIZE + 2, max_size=SIZE + 2))
    own = draw(st.booleans()) and length <= SIZE
    for slot, (token, keep) in enumerate(zip(held, kept, strict=True)):
        token = slot if own else token
        buffer.tokens[slot] = token if token < length and (keep or own) else -1
    buffer.lru = list(draw(st.permutations(range(SIZE))))
    return buffer, length


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_random_residencies_agree_with_the_oracle(data):
    drawn = [data.draw(buffers()) for _ in range(2)]
    both = [buffer for buffer, _ in drawn]
    before = residency_of(*both)
    position = st.one_of(st.integers(-2, LONGEST + 1), st.sampled_from([0, 1, SIZE, 2**31 - 1]))
    wanted = [
        data.draw(st.lists(position, min_size=SIZE, max_size=SIZE), label="positions") for _ in both
    ]
    seq_lens = jnp.asarray([length for _, length in drawn], jnp.int32)
    after, swap = plan(before, jnp.asarray(wanted, jnp.int32), seq_lens)
    slots = [
        buffer.swap(each, length) for (buffer, length), each in zip(drawn, wanted, strict=True)
    ]
    check(before, after, swap, both, slots)


def test_drafts_share_a_buffer_in_the_order_of_their_tokens():
    buffer = Buffer(SIZE, 2)
    buffer.tokens = [0, 1, 2, 3, 4, 5, 29, 30]
    before = residency_of(buffer, Buffer(SIZE, 2))
    positions = jnp.asarray([[[29, 9, 5], [9, 30, 8]], [[-1] * 3] * 2], jnp.int32)
    seq_lens = jnp.asarray([31, 0], jnp.int32)
    after, swap = plan(before, positions, seq_lens)
    flat_after, flat = plan(before, positions.reshape(2, 6), seq_lens)
    assert swap.slots.shape == positions.shape
    np.testing.assert_array_equal(swap.slots.reshape(2, 6), flat.slots)
    np.testing.assert_array_equal(after.lru, flat_after.lru)
    slots = buffer.swap([29, 9, 5, 9, 30, 8], 31)
    assert slots == [6, 0, 5, 0, 7, 1]
    check(before, after, swap, [buffer, Buffer(SIZE, 2)], [slots, [-1] * 6])


def test_requests_without_pages_have_no_rows():
    buffer = Buffer(SIZE, 2)
    buffer.admit(20)
    before = residency_of(buffer, buffer)
    # Request 0 has no host pages; of request 1's buffer only the slots 0 to 3 exist.
    tables = before.page_table.at[0].set(-1), before.buffer_table.at[1, 1].set(-1)
    before = dataclasses.replace(before, page_table=tables[0], buffer_table=tables[1])
    positions = jnp.asarray([[0, 1, 19, 5, 9, -1], [10, 11, 12, 13, 14, 3]], jnp.int32)
    after, swap = plan(before, positions, jnp.asarray([20, 20], jnp.int32))
    assert (np.asarray(swap.slots[0]) == -1).all()
    np.testing.assert_array_equal(after.tokens[0], before.tokens[0])
    # Three misses find a place; the hit keeps its own; the other two are not to be had.
    expected = rows_of(before.buffer_table, 1, [0, 1, 2, -1, -1, 3])
    np.testing.assert_array_equal(swap.slots[1], expected)
    assert after.tokens[1].tolist() == [10, 11, 12, 3, 4, 5, -1, -1]


def test_one_program_of_static_shapes_without_the_host():
    before = residency_of(Buffer(SIZE, 2), Buffer(SIZE, 2))
    positions, seq_lens = jnp.zeros((2, 6), jnp.int32), jnp.zeros(2, jnp.int32)
    traced = jax.make_jaxpr(plan_swap)(before, positions, seq_lens)
    assert "callback" not in str(traced)
    lowered = jax.jit(plan_swap).lower(before, positions, seq_lens).as_text()
    assert "tensor<?" not in lowered and "callback" not in lowered


def test_wrong_arguments_say_what_was_expected():
    before = residency_of(Buffer(SIZE, 2), Buffer(SIZE, 2))
    lens, none = jnp.zeros(2, jnp.int32), jnp.zeros((2, 3), jnp.int32)
    for positions, seq_lens, message in [
        (jnp.zeros((2, 7), jnp.int32), lens, r"expected 1 to sizes.device_buffer_size=6"),
        (jnp.zeros((2, 2, 4), jnp.int32), lens, r"8 positions of a request"),
        (jnp.zeros((2, 0), jnp.int32), lens, r"0 positions of a request"),
        (jnp.zeros((3, 2), jnp.int32), lens, r"expected int32 \[2, k\]"),
        (jnp.zeros(2, jnp.int32), lens, r"expected int32 \[2, k\]"),
        (none.astype(jnp.uint32), lens, r"expected int32 \[2, k\]"),
        (none, jnp.zeros(3, jnp.int32), r"seq_lens: got int32\[3\], expected int32\[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_swap(before, positions, seq_lens)


def test_sizes():
    assert (SIZES.max_pages, SIZES.buffer_slots, SIZES.max_buffer_pages) == (10, 8, 2)
    assert [SIZES.buffer_pages_of(n) for n in (0, 1, 4, 5, 6, 7, 40)] == [0, 1, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="newest=0: expected a whole number") as error:
        dataclasses.replace(SIZES, newest=0, page_size=-1)
    assert "page_size=-1" in str(error.value)
    with pytest.raises(ValueError, match=r"num_pages=536870912 of self\.page_size=4"):
        dataclasses.replace(SIZES, num_pages=2**29)
