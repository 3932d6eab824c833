"""Dense decode: it is sparse decode to every position of the request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.attention import Implementation, dense_decode, sparse_decode
from tests.attention.cases import SCALE, poison, random_queries, random_rows, same_bits
from tests.helpers import assert_close

GARBAGE = 2147480000


def paged_case(page_size: int, seq_lens: list[int]) -> tuple[jax.Array, jax.Array, int]:
    """A page table with garbage tails, the slot of each position (-1 past the end), and pages."""
    counts = [-(-length // page_size) for length in seq_lens]
    free = np.random.default_rng(page_size).permutation(sum(counts) + 3)
    table = np.full((len(seq_lens), max(counts) + 2), GARBAGE)
    slots = np.full((len(seq_lens), max(seq_lens)), -1)
    for i, (count, length) in enumerate(zip(counts, seq_lens, strict=True)):
        table[i, :count], free = free[:count], free[count:]
        positions = np.arange(length)
        slots[i, :length] = table[i, positions // page_size] * page_size + positions % page_size
    return jnp.asarray(table, jnp.int32), jnp.asarray(slots, jnp.int32), sum(counts) + 3


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [1, 53, 64, 3000])
def test_dense_is_sparse_to_every_position(
    page_size: int, causal: bool, implementation: Implementation
):
    """At lengths of 0, fewer than the queries, on and beside a page, and past one step of keys."""
    seq_lens = [0, 1, 2, 63, 64, 65, 2100]
    s_q = 3
    table, slots, pages = paged_case(page_size, seq_lens)
    rows = poison(random_rows(0, pages, page_size), slots)
    q = random_queries(1, len(seq_lens), s_q, 2)
    ours = dense_decode(
        q,
        rows,
        table,
        jnp.asarray(seq_lens, jnp.int32),
        sm_scale=SCALE,
        causal=causal,
        implementation=implementation,
    )
    behind = np.arange(s_q - 1, -1, -1) if causal else np.zeros(s_q, int)
    lengths = jnp.asarray(np.array(seq_lens)[:, None] - behind[None], jnp.int32)
    out, lse = sparse_decode(
        q,
        rows,
        jnp.broadcast_to(slots[:, None], (len(seq_lens), s_q, slots.shape[1])),
        sm_scale=SCALE,
        topk_length=lengths,
        implementation="reference",
    )
    assert_close(ours[0], out, abs_tol=8e-4, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(ours[1], lse, abs_tol=2e-6, rel_tol=2e-6)
    assert np.isneginf(np.asarray(lse[0])).all()


def test_positions_past_the_table_are_not_attended_to():
    rows, table = random_rows(0, 5, 4), jnp.array([[3, 1]], jnp.int32)
    q = random_queries(1, 1, 1, 2)
    long, exact = (
        dense_decode(q, rows, table, jnp.array([n], jnp.int32), sm_scale=SCALE) for n in (100, 8)
    )
    same_bits(long, exact)


@pytest.mark.parametrize("length", [-3, -(2**31)])
def test_a_negative_length_is_empty(length: int):
    q, rows = random_queries(1, 1, 2, 2), random_rows(0, 5, 4)
    for implementation in ("xla", "reference"):
        _, lse = dense_decode(
            q,
            rows,
            jnp.array([[3, 1]], jnp.int32),
            jnp.array([length], jnp.int32),
            sm_scale=SCALE,
            implementation=implementation,
        )
        assert np.isneginf(np.asarray(lse)).all()


def test_a_request_alone_has_the_bits_it_has_in_a_batch():
    seq_lens = [5, 130, 0, 64, 77]
    table, _, pages = paged_case(64, seq_lens)
    rows, q = random_rows(0, pages, 64), random_queries(1, 5, 2, 3)
    lengths = jnp.asarray(seq_lens, jnp.int32)
    together = dense_decode(q, rows, table, lengths, sm_scale=SCALE, implementation="xla")
    for i in range(5):
        part = slice(i, i + 1)
        alone = dense_decode(
            q[part], rows, table[part], lengths[part], sm_scale=SCALE, implementation="xla"
        )
        same_bits(alone, jax.tree.map(lambda x, part=part: x[part], together))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 70, 5000])
def test_a_window_is_the_last_of_the_positions(
    window: int, causal: bool, implementation: Implementation
):
    seq_lens = [0, 1, 2, 64, 70, 71, 300, 2100]
    table, slots, pages = paged_case(64, seq_lens)
    q, rows = random_queries(1, len(seq_lens), 3, 2), random_rows(0, pages, 64)
    ours = dense_decode(
        q,
        rows,
        table,
        jnp.asarray(seq_lens, jnp.int32),
        sm_scale=SCALE,
        causal=causal,
        window=window,
        implementation=implementation,
    )
    behind = np.arange(2, -1, -1) if causal else np.zeros(3, int)
    lengths = (np.array(seq_lens)[:, None] - behind)[..., None]
    places = np.arange(slots.shape[1])
    seen = (places < lengths) & (places >= lengths - window)
    out, lse = sparse_decode(
        q,
        rows,
        jnp.asarray(np.where(seen, np.asarray(slots)[:, None], -1)),
        sm_scale=SCALE,
        implementation="reference",
    )
    assert_close(ours[0], out, abs_tol=8e-4, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(ours[1], lse, abs_tol=2e-6, rel_tol=2e-6)


@pytest.mark.parametrize("window", [0, -1, 2.0])
def test_a_window_is_a_positive_number(window):
    q, rows = random_queries(1, 1, 1, 2), random_rows(0, 5, 4)
    table, lengths = jnp.array([[3, 1]], jnp.int32), jnp.array([5], jnp.int32)
    with pytest.raises(ValueError, match=r"window=.*expected a positive int"):
        dense_decode(q, rows, table, lengths, sm_scale=SCALE, window=window)
