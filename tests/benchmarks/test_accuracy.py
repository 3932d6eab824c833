"""The f64 reference and the errors against it, on numbers worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accuracy
from jmla import reference
from jmla.layouts import BF16Rows
from tests.attention.cases import random_queries, random_rows


def test_attention_to_two_keys():
    q = np.array([[[1.0, 0.0], [0.0, 0.0]]])
    keys = np.array([[[math.log(3.0), 8.0], [0.0, 4.0]]])
    out, lse = accuracy.attend(q, keys, sm_scale=1.0, value_dim=2)
    # Weights 3/4 and 1/4, then halves.
    np.testing.assert_allclose(out[0, :, 1], [7.0, 6.0])
    np.testing.assert_allclose(lse, [[math.log(4.0), math.log(2.0)]])


def test_it_agrees_with_the_library_s_definition():
    rows: BF16Rows = random_rows(0, 40)
    q = random_queries(1, 3, 1, 4)
    slots = jnp.asarray(np.random.default_rng(2).integers(0, 40, (3, 1, 9)).astype(np.int32))
    expected, expected_lse = reference.sparse_decode(
        q.astype(jnp.float32), rows, slots, sm_scale=0.6
    )
    keys = rows.gather(slots[:, 0]).dequantize()
    out, lse = accuracy.attend(
        np.asarray(q[:, 0]), np.asarray(keys), sm_scale=0.6, value_dim=rows.value_dim
    )
    errors = accuracy.compare(np.asarray(expected[:, 0]), np.asarray(expected_lse[:, 0]), out, lse)
    assert errors.out < 1e-6
    assert errors.lse < 1e-5


def test_errors_of_known_differences():
    exact, exact_lse = np.full((2, 3, 4), 2.0), np.zeros((2, 3))
    lse = exact_lse.copy()
    lse[1, 2] = -0.25
    errors = accuracy.compare(exact * 1.01, lse, exact, exact_lse)
    assert errors.out == pytest.approx(0.01)
    assert errors.lse == 0.25


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float):
    exact, exact_lse = np.ones((1, 2, 3)), np.zeros((1, 2))
    out = exact.copy()
    out[0, 1, 1] = bad
    assert accuracy.compare(out, exact_lse, exact, exact_lse) == (math.inf, 0.0)
    assert accuracy.compare(exact, exact_lse + bad, exact, exact_lse) == (0.0, math.inf)


def test_shapes_must_match():
    with pytest.raises(ValueError, match=r"lse.shape=\(2, 1\)"):
        accuracy.compare(np.ones((1, 2, 3)), np.ones((2, 1)), np.ones((1, 2, 3)), np.ones((1, 2)))


@pytest.mark.parametrize(
    ("tokens", "count", "expected"), [(1, 4, [0]), (3, 4, [0, 1, 2]), (128, 4, [0, 42, 85, 127])]
)
def test_sampled_tokens_span_the_batch(tokens: int, count: int, expected: list[int]):
    assert accuracy.sample(tokens, count).tolist() == expected
