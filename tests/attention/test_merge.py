"""Merging partial results by their LSE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.attention import merge, sparse_decode
from tests.attention.cases import SCALE, random_indices, random_queries, random_rows, same_bits
from tests.helpers import assert_close


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def test_parts_of_the_keys_merge_to_the_whole():
    q, rows = random_queries(0, 3, 2, 4), random_rows(1, 50)
    indices = random_indices(2, 3, 2, 40, slots=50)
    parts = [
        sparse_decode(q, rows, part, sm_scale=SCALE)
        for part in (indices[..., :1], indices[..., 1:30], indices[..., 30:])
    ]
    out, lse = merge(*zip(*parts, strict=True))
    whole, whole_lse = sparse_decode(q, rows, indices, sm_scale=SCALE)
    assert out.dtype == jnp.bfloat16
    assert_close(out, whole, abs_tol=2e-3, rel_tol=2.01 / 128)
    assert_close(lse, whole_lse, abs_tol=2e-6, rel_tol=2e-6)


def test_arrays_and_lists_are_the_same():
    outs = normal(0, 3, 5, 2, 8, dtype=jnp.float32)
    lses = normal(1, 3, 5, 2, dtype=jnp.float32)
    same_bits(merge(outs, lses), merge(list(outs), tuple(lses)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_empty_part_changes_nothing_even_if_it_holds_nan(sign: int, dtype):
    out = normal(0, 4, 2, 8, dtype=dtype)
    lse = normal(1, 4, 2, dtype=jnp.float32)
    merged = merge([jnp.full_like(out, jnp.nan), out], [jnp.full_like(lse, sign * jnp.inf), lse])
    same_bits(merged, (out, lse))


@pytest.mark.parametrize("signs", [(-1, -1), (1, 1), (-1, 1)])
def test_only_empty_parts_give_zero_and_minus_infinity(signs: tuple[int, int]):
    outs = jnp.full((2, 3, 1, 4), jnp.nan, jnp.bfloat16)
    lses = jnp.array(signs, jnp.float32)[:, None, None] * jnp.full((2, 3, 1), jnp.inf)
    out, lse = merge(outs, lses)
    same_bits(out, jnp.zeros((3, 1, 4), jnp.bfloat16))
    assert np.isneginf(np.asarray(lse)).all()


def test_weights_do_not_overflow():
    outs = jnp.array([[[1.0]], [[5.0]]], jnp.float32)
    out, lse = merge(outs, jnp.array([[3e38], [-3e38]], jnp.float32))
    assert (float(out[0, 0]), float(lse[0])) == (1.0, float(np.float32(3e38)))


def test_one_part_is_itself():
    out = normal(0, 1, 4, 2, 8, dtype=jnp.bfloat16)
    lse = normal(1, 1, 4, 2, dtype=jnp.float32)
    same_bits(merge(out, lse), (out[0], lse[0]))


def test_wrong_arguments():
    out, lse = jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match=r"expected float32 \(2, 3, 4\)"):
        merge(out, lse.swapaxes(1, 2))
    with pytest.raises(ValueError, match="expected float32"):
        merge(out, lse.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="at least one"):
        merge([], [])
    with pytest.raises(ValueError, match="at least one"):
        merge(out[:0], lse[:0])
    with pytest.raises(ValueError, match="one shape and dtype"):
        merge([out[0], out[0, :2]], [lse[0], lse[0]])
