"""The 324-byte rows: e2m1 pairs and one scale byte per 16."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmla.layouts import FP4Rows, KVLayout, dequantize, from_bytes, quantize, to_bytes
from tests.helpers import bf16, golden
from tests.layouts.cases import u16

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def fp4_rows(x: object) -> FP4Rows:
    rows = quantize(jnp.asarray(x), KVLayout.FP4, rope_dim=0)
    assert isinstance(rows, FP4Rows)
    return rows


def codes_of(rows: FP4Rows) -> np.ndarray:
    packed = np.asarray(rows.packed)
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


@pytest.mark.parametrize("jit", [False, True])
def test_golden_bytes(jit):
    data = golden("kv4")
    encode = lambda x: quantize(x, KVLayout.FP4)  # noqa: E731
    rows = (jax.jit(encode) if jit else encode)(bf16(data["kv_bf16"]))
    assert isinstance(rows, FP4Rows)
    np.testing.assert_array_equal(rows.packed, data["packed"])
    np.testing.assert_array_equal(rows.exponents[:, 0], data["scales"])
    read = jax.jit(dequantize) if jit else dequantize
    np.testing.assert_array_equal(u16(read(rows)), data["dequant_bf16"])
    assert (data["scales"] == 94).any(), "the golden file holds no zero block"


def test_packed_row_is_data_then_scales():
    data = golden("kv4")
    joined = np.concatenate([data["packed"][:, 0], data["scales"]], axis=-1)
    rows = from_bytes(jnp.asarray(joined), KVLayout.FP4)
    np.testing.assert_array_equal(u16(dequantize(rows)), data["dequant_bf16"][:, 0])
    np.testing.assert_array_equal(to_bytes(rows), joined)


def test_ties_go_to_the_larger_magnitude():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    block = np.concatenate([ties, -ties, [6.0, -6.0]]).astype(np.float32)
    x = np.stack([block * 2.0**e for e in (-30, 0, 20)]).astype(np.float32)
    rows = fp4_rows(x)
    np.testing.assert_array_equal(rows.exponents[:, 0], np.array([97, 127, 147], np.uint8))
    np.testing.assert_array_equal(codes_of(rows)[1], [*range(1, 8), *range(9, 16), 7, 15])
    below = x.copy()
    below[:, :14] = np.nextafter(x[:, :14], np.float32(0))
    np.testing.assert_array_equal(codes_of(fp4_rows(below))[2], [*range(7), *range(8, 15), 7, 15])


def test_signs_of_zero_and_of_what_rounds_to_zero():
    x = np.zeros((1, 32), np.float32)
    subnormal = float(np.finfo(np.float32).smallest_subnormal)
    x[0, :4] = np.array([1.0, -0.0, -1e-3, -subnormal], np.float32)
    rows = fp4_rows(x)
    np.testing.assert_array_equal(codes_of(rows)[0, :5], [6, 0, 8, 8, 0])
    assert rows.exponents[0, 1] == 94 and not codes_of(rows)[0, 16:].any()


def test_the_even_element_is_in_the_low_four_bits():
    x = np.zeros((1, 16), np.float32)
    x[0, 0], x[0, 1] = 6.0, 0.5
    assert fp4_rows(x).packed[0, 0] == 0x17


def test_exponent_at_a_power_of_two_and_both_neighbours():
    exponents = np.arange(-33, 125)
    at = (6 * np.exp2(exponents.astype(np.float64))).astype(np.float32)
    for amax, extra in ((np.nextafter(at, 0), 0), (at, 0), (np.nextafter(at, np.inf), 1)):
        rows = fp4_rows(np.repeat(amax.astype(np.float32)[:, None], 16, axis=1))
        np.testing.assert_array_equal(rows.exponents[:, 0], exponents + extra + 127)
    assert (fp4_rows(np.full((1, 16), 1e-20, np.float32)).exponents == 94).all()


def test_every_code_and_every_scale_byte():
    packed = np.zeros((256, 16), np.uint8)
    packed[:, :8] = np.arange(0, 16, 2, dtype=np.uint8) | (np.arange(1, 16, 2, dtype=np.uint8) << 4)
    row = np.concatenate([packed[:, :8], np.arange(256, dtype=np.uint8)[:, None]], axis=-1)
    rows = from_bytes(jnp.asarray(row), KVLayout.FP4, rank=16, rope_dim=0)
    signed = np.concatenate([VALUES, -VALUES])
    with np.errstate(over="ignore"):
        expected = (signed * np.exp2(np.arange(256.0) - 127)[:, None]).astype(np.float32)
        expected = expected.astype(ml_dtypes.bfloat16)
    out = np.asarray(dequantize(rows))
    # Byte 0 is left out: its scale is subnormal, which XLA's CPU backend flushes.
    np.testing.assert_array_equal(out[2:255].view(np.uint16), expected[2:255].view(np.uint16))
    assert np.isnan(out[255].astype(np.float32)).all()


def test_outcome_of_nan_and_infinity():
    x = np.full((3, 32), 2.0, np.float32)
    x[0, 3] = np.nan
    x[1, 3], x[1, 4] = np.inf, -np.inf
    x[2, 3] = np.finfo(np.float32).max
    rows = fp4_rows(x)
    out = np.asarray(dequantize(rows), np.float32)
    assert rows.exponents[0, 0] == 255 and np.isnan(out[0, :16]).all()
    assert out[1, 3] == np.inf and out[1, 4] == -np.inf
    np.testing.assert_array_equal(out[1, [0, *range(5, 16)]], 0.0)
    np.testing.assert_array_equal(out[:, 16:], 2.0)
    assert np.isfinite(np.delete(out[2], 3)).all()
