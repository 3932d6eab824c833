"""Positions to slots of a paged cache, and to rows of a ragged buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmla.topk import paged_indices, ragged_indices

INT_MAX = np.iinfo(np.int32).max
INT_MIN = np.iinfo(np.int32).min
GARBAGE = 2147480000


def oracle(
    positions: np.ndarray, table: np.ndarray, page_size: int, requests: np.ndarray
) -> np.ndarray:
    out = np.full(positions.shape, -1, np.int64)
    for i, request in enumerate(requests.tolist()):
        for j, position in enumerate(positions[i].tolist()):
            if not 0 <= request < table.shape[0]:
                continue
            if not 0 <= position < table.shape[1] * page_size:
                continue
            page = int(table[request, position // page_size])
            if page >= 0 and (page + 1) * page_size <= INT_MAX:
                out[i, j] = page * page_size + position % page_size
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    page_size=st.sampled_from([1, 2, 53, 64]),
    expanded=st.booleans(),
)
def test_shuffled_pages_with_garbage_tails(seed: int, page_size: int, expanded: bool) -> None:
    rng = np.random.default_rng(seed)
    b, max_pages, rows, k = 3, 5, 6, 11
    table = rng.permutation(b * max_pages).reshape(b, max_pages).astype(np.int32)
    for row, used in enumerate(rng.integers(0, max_pages + 1, b)):
        table[row, used:] = rng.choice([GARBAGE, INT_MAX, INT_MIN, -1, -7])
    requests = rng.integers(-1, b + 1, rows).astype(np.int32)
    positions = rng.integers(-3, max_pages * page_size + 3, (rows, k)).astype(np.int32)
    positions[:, 0] = rng.choice([INT_MIN, -1, INT_MAX, GARBAGE], rows)
    if expanded:
        table, given_requests = table[np.clip(requests, 0, b - 1)], None
        requests = np.arange(rows, dtype=np.int32)
    else:
        given_requests = jnp.asarray(requests)
    got = paged_indices(
        jnp.asarray(positions), jnp.asarray(table), page_size=page_size, requests=given_requests
    )
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, oracle(positions, table, page_size, requests))


def test_minus_one_is_neither_gathered_nor_offset() -> None:
    positions = jnp.array([[0, -1, 5]], jnp.int32)
    table = jnp.array([[7, 9]], jnp.int32)
    np.testing.assert_array_equal(paged_indices(positions, table, page_size=4), [[28, -1, 37]])
    offsets = jnp.array([100], jnp.int32)
    np.testing.assert_array_equal(ragged_indices(positions, offsets), [[100, -1, 105]])
    negative = jnp.array([[INT_MIN, -2, 0]], jnp.int32)
    np.testing.assert_array_equal(ragged_indices(negative, offsets), [[-1, -1, 100]])


def test_a_page_too_large_for_int32_slots_does_not_wrap_into_the_cache() -> None:
    # 2**26 * 64 is 0 in int32 arithmetic.
    table = jnp.array([[2**26, 2**25, 2**25 - 2]], jnp.int32)
    positions = jnp.array([[0, 64, 128]], jnp.int32)
    got = paged_indices(positions, table, page_size=64)
    np.testing.assert_array_equal(got, [[-1, -1, (2**25 - 2) * 64]])


@pytest.mark.parametrize("table_shape", [(0, 4), (2, 0)])
def test_empty_page_table(table_shape: tuple[int, int]) -> None:
    requests = jnp.zeros(3, jnp.int32)
    table = jnp.zeros(table_shape, jnp.int32)
    got = paged_indices(jnp.ones((3, 2), jnp.int32), table, page_size=2, requests=requests)
    np.testing.assert_array_equal(got, np.full((3, 2), -1))


def test_jit_and_vmap() -> None:
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.integers(-1, 12, (2, 3, 4)), jnp.int32)
    table = jnp.asarray(rng.permutation(18).reshape(2, 3, 3), jnp.int32)

    def slots(positions: jax.Array, table: jax.Array) -> jax.Array:
        return ragged_indices(paged_indices(positions, table, page_size=4), jnp.ones(3, jnp.int32))

    want = np.stack([slots(p, t) for p, t in zip(positions, table, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(slots))(positions, table), want)


def test_wrong_arguments() -> None:
    positions, table = jnp.zeros((3, 2), jnp.int32), jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match="without requests="):
        paged_indices(positions, table, page_size=4)
    with pytest.raises(ValueError, match=r"requests: got int32\[2\], expected int32\[3\]"):
        paged_indices(positions, table, page_size=4, requests=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="page_size=0"):
        paged_indices(positions[:2], table, page_size=0)
    with pytest.raises(ValueError, match=r"positions\.shape"):
        paged_indices(positions[0], table, page_size=4)
    with pytest.raises(ValueError, match=r"page_table\.shape"):
        paged_indices(positions, table[0], page_size=4)
    with pytest.raises(ValueError, match="offsets: got"):
        ragged_indices(positions, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"positions\.shape"):
        ragged_indices(positions[0], jnp.zeros(2, jnp.int32))
