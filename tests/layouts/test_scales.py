"""The exact arithmetic under the quantisers."""

import fractions
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmla.layouts import _scales

F32 = np.finfo(np.float32)
positive_floats = st.floats(min_value=float(F32.tiny), max_value=float(F32.max), width=32)


def exact_smallest_exponent(amax: float, limit: float) -> int:
    """By rational arithmetic."""
    ratio = fractions.Fraction(amax) / fractions.Fraction(limit)
    e = math.frexp(amax)[1] - math.frexp(limit)[1] - 1
    while fractions.Fraction(2) ** e < ratio:
        e += 1
    return e


@pytest.mark.parametrize("limit", [448.0, 6.0])
@pytest.mark.parametrize("jit", [False, True])
def test_smallest_exponent_at_every_power_of_two_and_both_neighbours(limit, jit):
    steps = np.arange(-110, 127 - int(math.log2(limit)))
    at = (np.float32(limit) * np.exp2(steps.astype(np.float64))).astype(np.float32)
    function = lambda amax: _scales.smallest_exponent(amax, limit, floor=-126)  # noqa: E731
    function = jax.jit(function) if jit else function
    np.testing.assert_array_equal(function(jnp.asarray(at)), steps)
    below, above = np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf))
    np.testing.assert_array_equal(function(jnp.asarray(below)), steps)
    np.testing.assert_array_equal(function(jnp.asarray(above)), steps + 1)


@hypothesis.given(amax=positive_floats, limit=st.sampled_from([448.0, 6.0]))
def test_smallest_exponent_is_the_smallest(amax, limit):
    ours = _scales.smallest_exponent(jnp.array([amax], jnp.float32), limit, floor=-500)
    assert int(ours[0]) == exact_smallest_exponent(amax, limit)


def test_smallest_exponent_of_nothing_is_the_floor():
    tiny = jnp.array([0.0, F32.smallest_subnormal, F32.tiny], jnp.float32)
    np.testing.assert_array_equal(_scales.smallest_exponent(tiny, 448.0, floor=-13), -13)


def test_exp2_and_e8m0_are_exact():
    exponents = np.arange(-126, 128)
    powers = np.exp2(exponents.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(_scales.exp2(jnp.asarray(exponents, jnp.int32)), powers)
    decoded = np.asarray(_scales.e8m0_to_f32(jnp.arange(256, dtype=jnp.uint8)))
    np.testing.assert_array_equal(decoded[1:255], powers)
    assert decoded[:1].view(np.uint32) == 0x400000 and np.isnan(decoded[255])


@pytest.mark.parametrize("jit", [False, True])
def test_division_is_correctly_rounded_on_every_backend(jit):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((512, 64)) * 2.0 ** rng.uniform(-110, 120, (512, 1))).astype(
        np.float32
    )
    by = np.abs(x).max(-1, keepdims=True)
    divide = jax.jit(_scales.divide) if jit else _scales.divide
    by_constant = lambda x: _scales.divide(x, jnp.float32(448))  # noqa: E731
    by_constant = jax.jit(by_constant) if jit else by_constant
    np.testing.assert_array_equal(by_constant(jnp.asarray(by)), by / np.float32(448))
    np.testing.assert_array_equal(divide(jnp.asarray(x), jnp.asarray(by)), x / by)
    scales = by / np.float32(448)
    np.testing.assert_array_equal(divide(jnp.asarray(x), jnp.asarray(scales)), x / scales)
    small = np.float32(3e-9)
    by = by[by < 1e29]
    np.testing.assert_array_equal(divide(jnp.asarray(by), jnp.asarray(small)), by / small)


def test_division_of_what_is_not_finite():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0, F32.max], jnp.float32)
    expected = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, np.inf], np.float32)
    ours = np.asarray(_scales.divide(x, jnp.full_like(x, 0.5)))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("jit", [False, True])
def test_e4m3_rounds_once_and_saturates(jit):
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate(
        [codes, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))]
    )
    x = np.concatenate([x, -x, np.random.default_rng(0).uniform(-1, 1, 4096).astype(np.float32)])
    to_e4m3 = jax.jit(_scales.to_e4m3) if jit else _scales.to_e4m3
    ours = np.asarray(to_e4m3(jnp.asarray(x))).view(np.uint8)
    np.testing.assert_array_equal(ours, x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    widened = lambda x: _scales.to_e4m3(x).astype(jnp.float32)  # noqa: E731
    widened = jax.jit(widened) if jit else widened
    np.testing.assert_array_equal(
        np.asarray(widened(jnp.asarray(x))).view(np.uint32),
        x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32).view(np.uint32),
    )
    beyond = np.array([448.1, 464, 464.1, 500, 1e30, np.inf, -449, -np.inf], np.float32)
    np.testing.assert_array_equal(
        np.asarray(to_e4m3(jnp.asarray(beyond)), np.float32), np.sign(beyond) * 448
    )
    assert np.isnan(np.asarray(to_e4m3(jnp.array([jnp.nan, -jnp.nan])), np.float32)).all()


def test_amax_leaves_nan_out_and_bounds_infinity():
    blocks = jnp.array([[1, -3, jnp.nan], [jnp.nan] * 3, [-jnp.inf, 1, jnp.nan]], jnp.float32)
    np.testing.assert_array_equal(
        _scales.finite_amax(blocks), np.array([3, 0, F32.max], np.float32)
    )


def test_sign_of_subnormal_and_zero():
    x = np.array([-0.0, 0.0, -F32.smallest_subnormal, F32.smallest_subnormal, -1, 1], np.float32)
    np.testing.assert_array_equal(_scales.is_negative(jnp.asarray(x)), x < 0)
