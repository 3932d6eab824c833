"""The indexer's keys: two scale rules and the page-split bytes."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmla.layouts import IndexKeyRows, index_keys_from_bytes, quantize_index_keys
from tests.layouts.cases import assert_same_rows, latents, u16


def random_keys(*shape: int) -> jax.Array:
    return latents(*shape, width=128)


@pytest.mark.parametrize("jit", [False, True])
def test_fp32_rule(jit):
    keys = random_keys(64)
    quantise = jax.jit(quantize_index_keys) if jit else quantize_index_keys
    rows = quantise(keys)
    x = np.asarray(keys, np.float32)
    scales = np.maximum(np.abs(x).max(-1), np.float32(1e-4)) / np.float32(448)
    codes = np.clip(x / scales[:, None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(rows.scales, scales)
    np.testing.assert_array_equal(np.asarray(rows.keys).view(np.uint8), codes.view(np.uint8))


def test_pow2_rule_at_a_power_of_two_and_both_neighbours():
    steps = np.arange(-22, 119)
    at = (448 * np.exp2(steps.astype(np.float64))).astype(np.float32)
    for amax, extra in ((np.nextafter(at, 0), 0), (at, 0), (np.nextafter(at, np.inf), 1)):
        keys = jnp.asarray(np.repeat(amax[:, None], 4, axis=1))
        rows = quantize_index_keys(keys, scale_format="pow2")
        np.testing.assert_array_equal(rows.scales, np.exp2(steps + extra).astype(np.float32))


def test_small_keys_take_the_smallest_scale():
    keys = jnp.array([[0.0, 0.0], [1e-5, -1e-5]], jnp.float32)
    assert (quantize_index_keys(keys, scale_format="pow2").scales == 2.0**-22).all()
    fp32 = quantize_index_keys(keys)
    assert (fp32.scales == np.float32(1e-4) / np.float32(448)).all()
    assert not np.asarray(fp32.keys[0]).view(np.uint8).any()
    np.testing.assert_allclose(np.asarray(fp32.dequantize(), np.float32), keys, rtol=2**-4)


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_outcome_of_nan_and_infinity(scale_format):
    keys = np.full((2, 128), 2.0, np.float32)
    keys[0, 3], keys[1, 3], keys[1, 4] = np.nan, np.inf, -np.inf
    rows = quantize_index_keys(jnp.asarray(keys), scale_format=scale_format)
    out = np.asarray(rows.dequantize(), np.float32)
    assert set(np.flatnonzero(np.isnan(out[0]))) == {3}
    np.testing.assert_array_equal(np.delete(out[0], 3), 2.0)
    assert out[1, 3] == np.inf and out[1, 4] == -np.inf and not out[1, 5:].any()


def test_where_each_byte_of_a_page_lies():
    rows = quantize_index_keys(random_keys(2, 64))
    packed = np.asarray(rows.pack())
    assert packed.shape == (2, 8448)
    for token in (0, 1, 63):
        np.testing.assert_array_equal(
            packed[1, 128 * token : 128 * token + 128],
            np.asarray(rows.keys[1, token]).view(np.uint8),
        )
        scale = packed[1, 8192 + 4 * token : 8196 + 4 * token].copy().view(np.float32)
        assert scale[0] == rows.scales[1, token]


@hypothesis.given(data=st.data(), shape=st.sampled_from([(1, 1), (3, 7), (4, 8)]))
def test_any_page_of_bytes_round_trips(data, shape):
    page_size, dim = shape
    packed = data.draw(hnp.arrays(np.uint8, (2, page_size * (dim + 4))))
    rows = index_keys_from_bytes(jnp.asarray(packed), page_size=page_size, dim=dim)
    assert rows.shape == (2, page_size) and rows.dim == dim
    rows.check()
    np.testing.assert_array_equal(rows.pack(), packed)


def test_gather_set_reshape():
    rows = quantize_index_keys(random_keys(3, 2))
    slots = jnp.array([[5, -1, np.iinfo(np.int32).max], [np.iinfo(np.int32).min, 6, 0]], jnp.int32)
    gathered = rows.gather(slots)
    assert gathered.shape == (2, 3) and gathered.scales.shape == (2, 3)
    flat = u16(rows.dequantize()).reshape(6, -1)
    expected = np.stack([flat[5], *[np.zeros_like(flat[0])] * 4, flat[0]]).reshape(2, 3, -1)
    np.testing.assert_array_equal(u16(gathered.dequantize()), expected)
    empty = IndexKeyRows.zeros((3, 2), dim=128)
    order = jnp.array([0, 1, 2, 3, 4, 5, -1], jnp.int32)
    seven = rows.flat().gather(jnp.clip(order, 0))
    assert_same_rows(empty.set(order, seven), rows)


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="expected bfloat16 or float32"):
        quantize_index_keys(jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="expected 'pow2'"):
        quantize_index_keys(jnp.zeros((2, 4)), scale_format="e8m0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 8448 bytes"):
        index_keys_from_bytes(jnp.zeros((1, 8447), jnp.uint8), page_size=64)
    with pytest.raises(ValueError, match="length of an index key"):
        IndexKeyRows.zeros((1,), dim=0)
    with pytest.raises(ValueError, match="last axis of 4"):
        IndexKeyRows.zeros((1,), dim=4).encode(jnp.zeros((1, 5)))
