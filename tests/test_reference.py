"""The reference against a loop over queries, heads and keys in float64.

`tests/attention/test_golden.py` holds it against golden data.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jmla import reference
from jmla.layouts import BF16Rows
from tests.attention.cases import (
    SCALE,
    random_indices,
    random_queries,
    random_rows,
)
from tests.helpers import assert_close


def loop(q, latents, slots, sink, value_dim) -> tuple[np.ndarray, float, float]:
    """One head of one query: out, largest logit, lse."""
    slots = [s for s in slots if 0 <= s < len(latents)]
    if not slots:
        return np.zeros(value_dim), -np.inf, -np.inf
    logits = np.array([SCALE * float(q @ latents[s]) for s in slots])
    weights = np.exp(logits - logits.max())
    out = sum(w * latents[s][:value_dim] for w, s in zip(weights, slots, strict=True))
    lse = logits.max() + np.log(weights.sum())
    return out / weights.sum() / (1 + np.exp(sink - lse)), logits.max(), lse


def f64(x) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def check(ours, expected: list[tuple]) -> None:
    """`ours` is (out, lse) or (out, max_logits, lse); `expected` has one `loop` result a head."""
    out, *statistics = ours
    assert out.dtype == jnp.bfloat16
    wanted = [np.stack([f64(e[i]) for e in expected]) for i in range(3)]
    assert_close(out.reshape(wanted[0].shape), wanted[0], abs_tol=1e-5, rel_tol=1.01 / 256)
    for ours_1, wanted_1 in zip(statistics, wanted[-len(statistics) :], strict=True):
        assert ours_1.dtype == jnp.float32
        assert_close(ours_1.ravel(), wanted_1, abs_tol=2e-6, rel_tol=2e-6)


def test_sparse_decode():
    b, s_q, h, topk = 3, 2, 3, 17
    rows, extra = random_rows(0, 5, 8), random_rows(1, 7, 3)
    q = random_queries(2, b, s_q, h)
    indices = random_indices(3, b, s_q, topk, slots=40)
    extra_indices = random_indices(4, b, s_q, 9, slots=21)
    lengths = jnp.array([17, 0, 5], jnp.int32)
    extra_lengths = jnp.array([[9, 3], [0, 4], [-2, 100]], jnp.int32)
    sink = jnp.array([0.3, -jnp.inf, jnp.inf], jnp.float32)
    ours = reference.sparse_decode(
        q,
        rows,
        indices,
        sm_scale=SCALE,
        topk_length=lengths,
        attn_sink=sink,
        extra_rows=extra,
        extra_indices=extra_indices,
        extra_topk_length=extra_lengths,
    )
    keys = np.concatenate([f64(rows.flat().latents), f64(extra.flat().latents)])

    def slots(i: int, t: int) -> list[int]:
        main = indices[i, t, : max(0, int(lengths[i]))]
        more = extra_indices[i, t, : max(0, int(extra_lengths[i, t]))]
        return [s for s in main.tolist() if s < 40] + [s + 40 for s in more.tolist() if 0 <= s < 21]

    expected = [
        loop(f64(q[i, t, head]), keys, slots(i, t), float(sink[head]), 128)
        for i in range(b)
        for t in range(s_q)
        for head in range(h)
    ]
    check(ours, expected)


def test_sparse_prefill():
    t, h, topk = 5, 2, 12
    rows = random_rows(0, 30)
    q = random_queries(1, t, h)
    indices = random_indices(2, t, topk, slots=30)
    lengths = jnp.array([12, 0, 1, 7, 2**31 - 1], jnp.int32)
    ours = reference.sparse_prefill(q, rows, indices, sm_scale=SCALE, topk_length=lengths)
    keys = f64(rows.latents)
    expected = [
        loop(f64(q[i, head]), keys, indices[i, : int(lengths[i])].tolist(), -np.inf, 128)
        for i in range(t)
        for head in range(h)
    ]
    check(ours, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_decode(causal: bool):
    s_q, h, page_size = 3, 2, 4
    rows = random_rows(0, 6, page_size)
    q = random_queries(1, 4, s_q, h)
    garbage = 2147480000
    page_table = jnp.array(
        [[5, 0, 3], [2, garbage, -7], [garbage, 1, 4], [1, garbage, 4]], jnp.int32
    )
    seq_lens = jnp.array([11, 2, 0, 12], jnp.int32)
    ours = reference.dense_decode(q, rows, page_table, seq_lens, sm_scale=SCALE, causal=causal)
    keys = f64(rows.flat().latents)

    def slots(i: int, t: int) -> list[int]:
        length = int(seq_lens[i]) - (s_q - 1 - t if causal else 0)
        positions = range(max(0, length))
        return [int(page_table[i, p // page_size]) * page_size + p % page_size for p in positions]

    expected = [
        loop(f64(q[i, t, head]), keys, slots(i, t), -np.inf, 128)
        for i in range(4)
        for t in range(s_q)
        for head in range(h)
    ]
    check(ours, expected)


def test_merge_of_disjoint_sets_is_attention_to_their_union():
    rows = random_rows(0, 64)
    q = random_queries(1, 3, 1, 2)
    indices = random_indices(2, 3, 1, 30, slots=64)
    parts = [
        reference.sparse_decode(q.astype(jnp.float32), rows, part, sm_scale=SCALE)
        for part in (indices[..., :7], indices[..., 7:8], indices[..., 8:])
    ]
    merged, lse = reference.merge(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    whole, whole_lse = reference.sparse_decode(q.astype(jnp.float32), rows, indices, sm_scale=SCALE)
    assert_close(merged, whole, abs_tol=1e-6, rel_tol=1e-5)
    assert_close(lse, whole_lse, abs_tol=1e-6, rel_tol=1e-6)


def test_the_value_is_the_whole_row_where_there_is_no_rotary_part():
    rows = BF16Rows(random_rows(0, 9).latents, rank=192, rope_dim=0)
    indices = jnp.array([[4]], jnp.int32)
    out, _, _ = reference.sparse_prefill(random_queries(1, 1, 1), rows, indices, sm_scale=SCALE)
    np.testing.assert_array_equal(f64(out[0, 0]), f64(rows.latents[4]))
