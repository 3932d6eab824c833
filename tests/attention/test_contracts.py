"""The numbered contracts of the ops, on the XLA implementation; the reference has its tests."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.attention import dense_decode, sparse_decode, sparse_prefill
from tests.attention.cases import (
    INT_MAX,
    INT_MIN,
    SCALE,
    poison,
    random_indices,
    random_queries,
    random_rows,
    same_bits,
)
from tests.helpers import assert_close

OUT_TOLERANCE = {"abs_tol": 8e-4, "rel_tol": 2.01 / 128, "cos_tol": 5e-6}
LSE_TOLERANCE = {"abs_tol": 2e-6, "rel_tol": 2e-6}


def decode(q, rows, indices, **kwargs):
    return sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="xla", **kwargs)


def assert_same(ours, reference) -> None:
    assert_close(ours[0], reference[0], **OUT_TOLERANCE)
    for a, b in zip(ours[1:], reference[1:], strict=True):
        assert_close(a, b, **LSE_TOLERANCE)


# 1. One scale, always given; shapes; natural logarithm.


def test_1_sm_scale_has_no_default():
    q, rows, indices = random_queries(0, 1, 1, 1), random_rows(0, 4), jnp.zeros((1, 1, 1), int)
    with pytest.raises(TypeError, match="sm_scale"):
        sparse_decode(q, rows, indices)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="sm_scale"):
        sparse_prefill(q[0], rows, indices[0])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="sm_scale"):
        dense_decode(q, rows, indices[0], jnp.ones(1, int))  # type: ignore[call-arg]


def test_1_one_key_gives_its_value_and_its_logit():
    q, rows = random_queries(0, 2, 3, 5), random_rows(1, 4, 4)
    indices = random_indices(2, 2, 3, 1, slots=16, bad=0)
    out, lse = decode(q, rows, indices)
    keys = rows.flat().latents[indices[..., 0]]
    logits = SCALE * jnp.einsum(
        "bthw,btw->bth", q.astype(jnp.float32), keys.astype(jnp.float32), precision="highest"
    )
    same_bits(out, jnp.broadcast_to(keys[:, :, None, :128], (2, 3, 5, 128)))
    assert_close(lse, logits, **LSE_TOLERANCE)


def test_1_sm_scale_may_be_traced():
    q, rows = random_queries(0, 2, 1, 3), random_rows(1, 16)
    indices = random_indices(2, 2, 1, 9, slots=16)
    traced = jax.jit(lambda s: sparse_decode(q, rows, indices, sm_scale=s))(jnp.float32(SCALE))
    assert_same(traced, decode(q, rows, indices))


# 2. Indices: masked wherever out of range, counted as often as they occur, any width.


ANY_INDEX = st.one_of(st.integers(-2, 41), st.integers(INT_MIN, INT_MAX))


@hypothesis.given(
    indices=st.lists(ANY_INDEX, min_size=3 * 13, max_size=3 * 13),
    lengths=st.lists(st.integers(-1, 14), min_size=3, max_size=3),
)
def test_2_any_indices_agree_with_the_reference(indices: list[int], lengths: list[int]):
    used = [
        index if place < length else -1
        for length, row in zip(lengths, np.reshape(indices, (3, 13)), strict=True)
        for place, index in enumerate(row)
    ]
    q, rows = random_queries(1, 3, 2), poison(random_rows(0, 40), np.array(used))
    ours, wanted = (
        sparse_prefill(
            q,
            rows,
            jnp.array(indices, jnp.int32).reshape(3, 13),
            sm_scale=SCALE,
            topk_length=jnp.array(lengths, jnp.int32),
            implementation=implementation,
        )
        for implementation in ("xla", "reference")
    )
    assert_same(ours, wanted)


@pytest.mark.parametrize("bad", [INT_MIN, -123456, -1, 24, 25, 114514, INT_MAX])
def test_2_a_bad_index_anywhere_is_no_index(bad: int):
    q, rows = random_queries(0, 1, 1, 4), random_rows(1, 24)
    good = random_indices(2, 1, 1, 10, slots=24, bad=0)
    wanted = decode(q, rows, good)
    for place in (0, 5, 10):
        indices = jnp.asarray(np.insert(np.asarray(good), [place] * 3, bad, axis=-1))
        assert_same(decode(q, rows, indices), wanted)


def test_2_duplicates_count_as_often_as_they_occur():
    q, rows = random_queries(0, 1, 1, 4), random_rows(1, 24)
    once = decode(q, rows, jnp.array([[[7]]], jnp.int32))
    thrice = decode(q, rows, jnp.array([[[7, 7, 7]]], jnp.int32))
    same_bits(thrice[0], once[0])
    assert_close(thrice[1], once[1] + np.float32(np.log(3)), **LSE_TOLERANCE)


@pytest.mark.parametrize("topk", [1, 65, 2176, 5000])
def test_2_any_width(topk: int):
    q, rows = random_queries(0, 2, 1, 3), random_rows(1, 61)
    indices = random_indices(2, 2, 1, topk, slots=61)
    wanted = sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="reference")
    assert_same(decode(q, rows, indices), wanted)


def test_2_a_million_indices():
    rows, topk = random_rows(1, 100, rank=8, rope_dim=0), 1_000_003
    indices = jnp.full((1, 1, topk), -1, jnp.int32).at[0, 0, jnp.array([3, topk - 1])].set(5)
    out, lse = decode(random_queries(0, 1, 1, 1, width=8), rows, indices)
    wanted = decode(random_queries(0, 1, 1, 1, width=8), rows, jnp.full((1, 1, 2), 5, jnp.int32))
    assert_same((out, lse), wanted)


@pytest.mark.parametrize("per_token", [False, True])
def test_2_indices_past_topk_length_are_not_used(per_token: bool):
    q = random_queries(0, 2, 2, 3)
    indices = random_indices(1, 2, 2, 9, slots=30, bad=0)
    lengths = jnp.array([[4, 7], [0, 9]] if per_token else [4, 0], jnp.int32)
    wide = lengths if per_token else jnp.broadcast_to(lengths[:, None], (2, 2))
    used = jnp.where(jnp.arange(9)[None, None] < wide[..., None], indices, -1)
    rows = poison(random_rows(2, 30), used)
    ours = decode(q, rows, indices, topk_length=lengths)
    assert_same(ours, decode(q, rows, used))
    assert np.isfinite(np.asarray(ours[0], np.float32)).all()


@pytest.mark.parametrize("topk", [3, 2100])
@pytest.mark.parametrize("sink", [None, 0.5, float("inf"), float("-inf")])
def test_2_nothing_to_attend_gives_zero_and_minus_infinity(topk: int, sink: float | None):
    sinks = None if sink is None else jnp.full(2, sink, jnp.float32)
    q, rows = random_queries(0, 3, 2), poison(random_rows(1, 8))
    bad = jnp.array([-1, INT_MIN, 8, INT_MAX], jnp.int32)
    indices = bad[jnp.arange(3 * topk).reshape(3, topk) % 4]
    for implementation in ("xla", "reference"):
        out, max_logits, lse = sparse_prefill(
            q, rows, indices, sm_scale=SCALE, attn_sink=sinks, implementation=implementation
        )
        same_bits(out, jnp.zeros((3, 2, 128), jnp.bfloat16))
        assert np.isneginf(np.asarray(max_logits)).all()
        assert np.isneginf(np.asarray(lse)).all()


def test_2_infinite_sinks():
    q, rows = random_queries(0, 1, 1, 3), random_rows(1, 8)
    indices = random_indices(2, 1, 1, 5, slots=8, bad=0)
    sink = jnp.array([-jnp.inf, jnp.inf, 0.25], jnp.float32)
    plain, plain_lse = decode(q, rows, indices)
    out, lse = decode(q, rows, indices, attn_sink=sink)
    same_bits(lse, plain_lse)
    same_bits(out[:, :, 0], plain[:, :, 0])
    same_bits(out[:, :, 1], jnp.zeros_like(plain[:, :, 1]))
    kept = 1 / (1 + np.exp(0.25 - np.asarray(lse[0, 0, 2])))
    assert_close(out[0, 0, 2], kept * np.asarray(plain[0, 0, 2], np.float32), **OUT_TOLERANCE)


def test_2_a_second_cache_is_more_keys():
    q = random_queries(0, 3, 2, 4)
    rows, extra = random_rows(1, 4, 16), random_rows(2, 30, 2)
    both = type(rows)(
        jnp.concatenate([rows.flat().latents, extra.flat().latents]), rank=128, rope_dim=64
    )
    indices = random_indices(3, 3, 2, 20, slots=64)
    extra_indices = random_indices(4, 3, 2, 2100, slots=60)
    lengths = jnp.array([1500, 0, 2100], jnp.int32)
    used = jnp.where(jnp.arange(2100)[None, None] < lengths[:, None, None], extra_indices, -1)
    moved = jnp.where((used >= 0) & (used < 60), used + 64, -1)
    in_first = jnp.where(indices < 64, indices, -1)
    ours = decode(
        q,
        rows,
        indices,
        extra_rows=extra,
        extra_indices=extra_indices,
        extra_topk_length=lengths,
    )
    assert_same(ours, decode(q, both, jnp.concatenate([in_first, moved], axis=-1)))


# 3. NaN in rows that no valid index names.


def test_3_nan_in_unnamed_rows_never_reaches_a_result():
    q = random_queries(0, 5, 1, 3)
    indices = jnp.clip(random_indices(1, 5, 1, 40, slots=90), -5, 95)
    indices = jnp.where((indices == 0) | (indices == 89), -1, indices)  # what -1 may wrap to
    clean = random_rows(2, 30, 3)
    wanted = decode(q, clean, indices)
    assert np.isfinite(np.asarray(wanted[0], np.float32)).all()
    same_bits(decode(q, poison(clean, indices), indices), wanted)


def test_3_nan_in_a_named_row_does():
    """The comparison above would also pass if nothing were read."""
    q, rows = random_queries(0, 1, 1, 2), poison(random_rows(1, 4))
    out, lse = decode(q, rows, jnp.array([[[2]]], jnp.int32))
    assert np.isnan(np.asarray(out, np.float32)).all()
    assert np.isnan(np.asarray(lse)).all()


# 4. Any number of heads, any page size, any batch.


@pytest.mark.parametrize("heads", [1, 15, 16, 17])
@pytest.mark.parametrize("topk", [20, 2100])
def test_4_the_first_heads_do_not_depend_on_the_others(heads: int, topk: int):
    q, rows = random_queries(0, 5, 48), random_rows(1, 64)
    indices = random_indices(2, 5, topk, slots=64)
    all_heads = sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="xla")
    some = sparse_prefill(q[:, :heads], rows, indices, sm_scale=SCALE, implementation="xla")
    out, top, lse = (x[:, :heads] for x in all_heads)
    same_bits(some[:2], (out, top))
    # XLA computes the logarithm in another fusion if one block of heads needs no loop.
    on_gpu = jax.default_backend() == "gpu"
    np.testing.assert_allclose(some[2], lse, rtol=2e-7 if on_gpu else 0)


@pytest.mark.parametrize("page_size", [1, 53, 576])
def test_4_page_sizes(page_size: int):
    pages = -(-130 // page_size)
    flat = random_rows(0, pages * page_size)
    q, indices = random_queries(1, 2, 1, 3), random_indices(2, 2, 1, 50, slots=130)
    same_bits(decode(q, flat.reshape(pages, page_size), indices), decode(q, flat, indices))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_4_empty_batches(implementation):
    rows = random_rows(0, 4, 8)
    table, lengths = jnp.zeros((0, 3), jnp.int32), jnp.zeros(0, jnp.int32)
    q = random_queries(1, 0, 2, 3)
    for shape in ((0, 2, 3), (2, 0, 3)):
        out, lse = sparse_decode(
            random_queries(1, *shape),
            rows,
            jnp.zeros((*shape[:2], 5), jnp.int32),
            sm_scale=SCALE,
            implementation=implementation,
        )
        assert (out.shape, lse.shape) == ((*shape, 128), shape)
    out, max_logits, lse = sparse_prefill(
        q[:, 0],
        rows,
        jnp.zeros((0, 7), jnp.int32),
        sm_scale=SCALE,
        attn_sink=jnp.zeros(3, jnp.float32),
        implementation=implementation,
    )
    assert (out.shape, max_logits.shape, lse.shape) == ((0, 3, 128), (0, 3), (0, 3))
    out, lse = dense_decode(q, rows, table, lengths, sm_scale=SCALE, implementation=implementation)
    assert (out.shape, lse.shape) == ((0, 2, 3, 128), (0, 2, 3))


def test_4_more_than_65535_queries():
    count = 70_000
    q, rows = random_queries(0, count, 1, width=16), random_rows(1, 50, rank=16, rope_dim=0)
    indices = (jnp.arange(count, dtype=jnp.int32) % 50)[:, None]
    out, _, _ = sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="xla")
    same_bits(out[:, 0], rows.latents[indices[:, 0]])


def test_4_a_cache_without_slots_masks_everything():
    rows = random_rows(0, 0, 64)
    for implementation in ("xla", "reference"):
        out, lse = sparse_decode(
            random_queries(1, 1, 1, 2),
            rows,
            jnp.zeros((1, 1, 3), jnp.int32),
            sm_scale=SCALE,
            implementation=implementation,
        )
        assert not np.asarray(out, np.float32).any()
        assert np.isneginf(np.asarray(lse)).all()


# 9. The same inputs give the same bits, alone and in any company.


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("topk", [50, 2100])
def test_9_a_row_alone_has_the_bits_it_has_in_a_batch(num_splits: int | None, topk: int):
    q, rows = random_queries(0, 9, 2, 3), random_rows(1, 96)
    indices = random_indices(2, 9, 2, topk, slots=96)
    together = decode(q, rows, indices, num_splits=num_splits)
    same_bits(decode(q, rows, indices, num_splits=num_splits), together)
    order = np.random.default_rng(0).permutation(9)
    shuffled = decode(q[order], rows, indices[order], num_splits=num_splits)
    same_bits(shuffled, jax.tree.map(lambda x: x[order], together))
    for i in (0, 4, 8):
        alone = decode(q[i : i + 1], rows, indices[i : i + 1], num_splits=num_splits)
        same_bits(alone, jax.tree.map(lambda x, i=i: x[i : i + 1], together))


def test_9_a_token_alone_has_the_bits_it_has_in_a_prompt():
    q, rows = random_queries(0, 50, 3), random_rows(1, 96)
    indices = random_indices(2, 50, 40, slots=96)
    together = sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="xla")
    for start, stop in ((0, 1), (7, 8), (3, 40), (49, 50)):
        part = sparse_prefill(
            q[start:stop], rows, indices[start:stop], sm_scale=SCALE, implementation="xla"
        )
        same_bits(part, jax.tree.map(lambda x, a=start, b=stop: x[a:b], together))


def test_9_splits_change_rounding_only():
    q, rows = random_queries(0, 2, 1, 3), random_rows(1, 96)
    indices = random_indices(2, 2, 1, 333, slots=96)
    wanted = sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="reference")
    for num_splits in (2, 7, 1000):
        assert_same(decode(q, rows, indices, num_splits=num_splits), wanted)


def test_9_prefill_and_decode_agree():
    q, rows = random_queries(0, 12, 5), random_rows(1, 96)
    indices = random_indices(2, 12, 70, slots=96)
    sink = jnp.linspace(-1, 1, 5, dtype=jnp.float32)
    out, _, lse = sparse_prefill(
        q, rows, indices, sm_scale=SCALE, attn_sink=sink, implementation="xla"
    )
    decoded = decode(q[:, None], rows, indices[:, None], attn_sink=sink)
    assert_same((out[:, None], lse[:, None]), decoded)
