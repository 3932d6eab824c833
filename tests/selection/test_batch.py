"""Batch metadata against plain Python, for every kind of batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmla.batch import BatchMeta, make_batch

GARBAGE = 2147480000
jitted_make_batch = jax.jit(make_batch, static_argnames=("num_tokens", "page_size"))


def page_table(seq_lens: list[int], page_size: int, max_pages: int, seed: int = 0) -> np.ndarray:
    """Shuffled pages for each request's tokens; garbage in the tails."""
    rng = np.random.default_rng(seed)
    pool = rng.permutation(len(seq_lens) * max_pages).tolist()
    table = np.full((len(seq_lens), max_pages), GARBAGE, np.int32)
    for row, length in enumerate(seq_lens):
        for page in range(min(max_pages, -(-length // page_size))):
            table[row, page] = pool.pop()
    return table


def build(
    seq_lens: list[int],
    new_lens: list[int],
    *,
    num_tokens: int,
    page_size: int = 4,
    max_pages: int = 8,
) -> tuple[BatchMeta, np.ndarray]:
    table = page_table(seq_lens, page_size, max_pages)
    batch = jitted_make_batch(
        jnp.array(seq_lens, jnp.int32),
        jnp.array(new_lens, jnp.int32),
        jnp.asarray(table),
        num_tokens=num_tokens,
        page_size=page_size,
    )
    return batch, table


def check(seq_lens: list[int], new_lens: list[int], *, num_tokens: int, page_size: int = 4) -> None:
    batch, table = build(seq_lens, new_lens, num_tokens=num_tokens, page_size=page_size)
    pages = table.tolist()

    def slot_of(request: int, position: int) -> int:
        return int(pages[request][position // page_size] * page_size + position % page_size)

    tokens: list[tuple[int, int, int, int]] = []  # request, position, offset, slot
    ragged: list[int] = []
    for request, (length, new) in enumerate(zip(seq_lens, new_lens, strict=True)):
        for position in range(length - new, length):
            real = position >= 0
            slot = slot_of(request, max(position, 0))
            tokens.append((request, position, len(ragged), slot) if real else (-1, -1, 0, -1))
        ragged += [slot_of(request, position) for position in range(length)]
    tokens = (tokens + [(-1, -1, 0, -1)] * num_tokens)[:num_tokens]
    expected = np.array(tokens, np.int32).reshape(num_tokens, 4)
    requests, positions, offsets, slots = expected.T
    np.testing.assert_array_equal(batch.seq_lens, seq_lens)
    np.testing.assert_array_equal(batch.new_lens, new_lens)
    np.testing.assert_array_equal(batch.cu_seqlens_q, np.cumsum([0, *new_lens]))
    np.testing.assert_array_equal(batch.cu_seqlens_k, np.cumsum([0, *seq_lens]))
    np.testing.assert_array_equal(batch.token_request, requests)
    np.testing.assert_array_equal(batch.token_position, positions)
    np.testing.assert_array_equal(batch.lengths, positions + 1)
    np.testing.assert_array_equal(batch.topk_lengths(3), np.minimum(positions + 1, 3))
    np.testing.assert_array_equal(batch.ragged_offsets, offsets)
    np.testing.assert_array_equal(batch.window_starts, offsets)
    np.testing.assert_array_equal(batch.window_ends, offsets + positions + 1)
    np.testing.assert_array_equal(batch.write_slots, slots)
    total = 80
    ragged += [-1] * (total - len(ragged))
    np.testing.assert_array_equal(batch.ragged_slots(total), ragged)
    for name, value in vars(batch).items():
        assert name == "page_size" or value.dtype == jnp.int32, name


def test_example_of_the_serving_world() -> None:
    batch, _ = build([10, 4], [3, 2], num_tokens=5)
    np.testing.assert_array_equal(batch.window_starts, [0, 0, 0, 10, 10])
    np.testing.assert_array_equal(batch.window_ends, [8, 9, 10, 13, 14])


@pytest.mark.parametrize(
    ("seq_lens", "new_lens", "num_tokens"),
    [
        pytest.param([9, 1, 30], [1, 1, 1], 3, id="decode"),
        pytest.param([9, 0, 30], [1, 1, 1], 3, id="decode with an idle row"),
        pytest.param([5, 8], [5, 8], 13, id="extend without prefix"),
        pytest.param([10, 4], [3, 2], 5, id="extend with prefix"),
        pytest.param([10, 6, 4], [1, 6, 2], 12, id="mixed, padded"),
        pytest.param([10, 4, 2], [4, 4, 4], 12, id="four draft tokens, one row too short"),
        pytest.param([7, 0, 0, 3], [2, 0, 0, 1], 3, id="zero-length requests"),
        pytest.param([0, 7, 5], [0, 0, 5], 6, id="requests that take no part"),
        pytest.param([6, 6], [6, 6], 7, id="tokens beyond num_tokens"),
        pytest.param([6, 6], [6, 6], 0, id="no tokens"),
        pytest.param([], [], 4, id="empty batch, padded"),
        pytest.param([], [], 0, id="empty batch"),
    ],
)
def test_kinds_of_batch(seq_lens: list[int], new_lens: list[int], num_tokens: int) -> None:
    check(seq_lens, new_lens, num_tokens=num_tokens)


@given(
    lens=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=4, max_size=4),
    num_tokens=st.sampled_from([11, 33]),
    page_size=st.sampled_from([2, 53]),
)
def test_any_batch(lens: list[tuple[int, int]], num_tokens: int, page_size: int) -> None:
    seq_lens = [prefix + new for prefix, new in lens]
    check(seq_lens, [new for _, new in lens], num_tokens=num_tokens, page_size=page_size)


def test_ragged_slots_of_fewer_rows_than_tokens() -> None:
    batch, table = build([5, 3], [1, 1], num_tokens=2)
    np.testing.assert_array_equal(batch.ragged_slots(6)[4:], table[:, [1, 0]][[0, 1], [0, 1]] * 4)
    assert batch.ragged_slots(0).shape == (0,)


def test_a_request_longer_than_its_page_table_has_no_slot_there() -> None:
    batch, table = build([8, 9], [1, 2], num_tokens=3, max_pages=2)
    last = table[1, 1]  # page of positions 4..7
    np.testing.assert_array_equal(batch.write_slots, [table[0, 1] * 4 + 3, last * 4 + 3, -1])
    assert batch.ragged_slots(17)[16] == -1


def test_negative_lengths_count_as_zero() -> None:
    batch, _ = build([3, 0, 2], [3, 0, 2], num_tokens=5)
    negative = make_batch(
        jnp.array([3, -5, 2], jnp.int32),
        jnp.array([3, -1, 2], jnp.int32),
        batch.page_table,
        num_tokens=5,
        page_size=4,
    )
    for ours, want in zip(jax.tree.leaves(negative), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(ours, want)


def test_jit_vmap_and_pytree() -> None:
    seq_lens = jnp.array([[10, 4], [3, 5]], jnp.int32)
    new_lens = jnp.array([[3, 2], [1, 4]], jnp.int32)
    table = jnp.asarray(np.random.default_rng(0).permutation(12).reshape(2, 2, 3), jnp.int32)

    def batch_of(seq_lens: jax.Array, new_lens: jax.Array, table: jax.Array) -> BatchMeta:
        return make_batch(seq_lens, new_lens, table, num_tokens=6, page_size=4)

    both = jax.jit(jax.vmap(batch_of))(seq_lens, new_lens, table)
    assert both.page_size == 4
    for i in range(2):
        one = batch_of(seq_lens[i], new_lens[i], table[i])
        for field in dataclasses.fields(one):
            if field.name != "page_size":
                stacked = getattr(both, field.name)
                np.testing.assert_array_equal(stacked[i], getattr(one, field.name))
    assert len(jax.tree.leaves(jax.tree.map(lambda _: None, both))) == 0


def test_wrong_arguments() -> None:
    lens, table = jnp.ones(2, jnp.int32), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="new_lens: got"):
        make_batch(lens, lens[:1], table, num_tokens=2, page_size=4)
    with pytest.raises(ValueError, match="seq_lens: got float32"):
        make_batch(jnp.ones(2), lens, table, num_tokens=2, page_size=4)
    with pytest.raises(ValueError, match=r"page_table\.shape"):
        make_batch(lens, lens, table[:1], num_tokens=2, page_size=4)
    with pytest.raises(ValueError, match="num_tokens=-1"):
        make_batch(lens, lens, table, num_tokens=-1, page_size=4)
    with pytest.raises(ValueError, match="page_size=0"):
        make_batch(lens, lens, table, num_tokens=2, page_size=0)
