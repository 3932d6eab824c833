"""The loop behind the XLA path in the step widths that GPUs use, which no CPU call reaches."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jmla import _xla_attention as xla
from jmla.layouts import BF16Rows
from tests.helpers import assert_close


@pytest.mark.parametrize("topk", [1, 100, 2048, 5000])
def test_a_step_gathers_no_more_than_the_bound(topk):
    rows = xla.widest_step(topk)
    assert 1 <= rows <= xla.MAX_ROWS_PER_STEP
    assert rows * min(topk, xla.KEYS_PER_STEP) <= xla.MAX_GATHERED_ROWS
    assert xla.widest_step(256) == 128 and xla.widest_step(2048) == xla.DECODE_ROWS_PER_STEP


@pytest.mark.parametrize("rows_per_step", [xla.DECODE_ROWS_PER_STEP, xla.widest_step(40)])
def test_the_width_of_a_step_changes_rounding_only(rows_per_step):
    q_key, row_key, index_key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(q_key, (21, 1, 3, 192)).astype(jnp.bfloat16)
    rows = BF16Rows(
        jax.random.normal(row_key, (64, 192)).astype(jnp.bfloat16), rank=128, rope_dim=64
    )
    lists = xla.KeyLists(
        rows,
        jax.random.randint(index_key, (21, 40), -3, 70, jnp.int32),
        jnp.full((21, 1), 33, jnp.int32),
    )
    results = []
    for width in (1, rows_per_step):
        loop = functools.partial(
            xla._attend_loop, page_sizes=(1,), num_splits=1, rows_per_step=width, window=None
        )
        results.append(jax.jit(loop)(q, [lists], jnp.float32(0.1), None))
    for one, many, tol in zip(*results, (8e-3, 1e-5, 1e-5), strict=True):
        assert one.shape[0] == 21
        assert_close(many, one, abs_tol=tol, rel_tol=tol)
