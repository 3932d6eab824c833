"""The kernel of index queries on a Hopper: every sum and product of f32 rounded by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla.index_query import RawIndexQueries
from tests.selection.query_cases import CASES, Case

pytestmark = pytest.mark.usefixtures("hopper")


def prepare(case: Case, raw: RawIndexQueries, implementation: str = "mosaic_gpu"):
    return jmla.prepare_index_query(
        raw,
        hadamard=case.hadamard,
        scale_format="pow2" if case.pow2 else "fp32",
        implementation=implementation,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 37, 600])
def test_queries(case: Case, tokens: int):
    case = dataclasses.replace(case, tokens=tokens)
    raw = case.draw(tokens)
    codes, weights = prepare(case, raw)
    wanted_codes, wanted_weights = case.expected(raw)
    got = np.asarray(jax.lax.bitcast_convert_type(codes, jnp.uint8))
    nan = wanted_codes & 0x7F == 0x7F
    np.testing.assert_array_equal(got[~nan], wanted_codes[~nan])
    assert (got[nan] & 0x7F == 0x7F).all()
    np.testing.assert_array_equal(weights, wanted_weights)


def test_none_takes_the_kernel_and_agrees_with_xla():
    """XLA may fuse a product with a sum: a rotated value differs in its last bit, rarely."""
    case = Case(tokens=64, heads=64)
    raw = case.draw()
    lowered = jax.jit(jmla.prepare_index_query).lower(raw)
    assert "mosaic_gpu" in lowered.as_text()
    ours, theirs = (prepare(case, raw, name) for name in ("mosaic_gpu", "xla"))
    a, b = (np.asarray(q.astype(jnp.float32)) for q, _ in (ours, theirs))
    assert (a != b).mean() < 0.01
    np.testing.assert_allclose(a, b, rtol=0.13, atol=2.0**-8)
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_under_vmap():
    case = Case(tokens=6)
    raw = case.draw()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), raw)
    got = jax.vmap(lambda each: prepare(case, each))(stacked)
    wanted = prepare(case, raw)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x[0].view(jnp.uint8), y.view(jnp.uint8))
        np.testing.assert_array_equal(x[1].view(jnp.uint8), y[::-1].view(jnp.uint8))
