"""The 656-byte rows: two scale rules, byte for byte."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmla.layouts import BlockScaleRows, dequantize, from_bytes, quantize, to_bytes
from tests.helpers import bf16, golden
from tests.layouts.cases import BLOCK, u16

E4M3 = ml_dtypes.float8_e4m3fn
F32 = np.finfo(np.float32)


def block_rows(x: object, scale_format: str) -> BlockScaleRows:
    rows = quantize(jnp.asarray(x), BLOCK, rope_dim=0, scale_format=scale_format)  # type: ignore[arg-type]
    assert isinstance(rows, BlockScaleRows)
    return rows


@pytest.mark.parametrize("jit", [False, True])
def test_pow2_matches_the_golden_bytes(jit):
    data = golden("fp8_block_scale_pow2")
    pack = lambda x: to_bytes(quantize(x, BLOCK))  # noqa: E731
    read = lambda packed: dequantize(from_bytes(packed, BLOCK))  # noqa: E731
    pack, read = (jax.jit(pack), jax.jit(read)) if jit else (pack, read)
    np.testing.assert_array_equal(pack(bf16(data["kv_bf16"])), data["packed"])
    np.testing.assert_array_equal(u16(read(jnp.asarray(data["packed"]))), data["dequant_bf16"])


@pytest.mark.parametrize("jit", [False, True])
def test_fp32_is_the_exact_rule(jit):
    kv = golden("sglang_quantize_656")["kv_bf16"]
    pack = lambda x: to_bytes(quantize(x, BLOCK, scale_format="fp32"))  # noqa: E731
    packed = np.asarray((jax.jit(pack) if jit else pack)(bf16(kv)))
    tiles = (
        kv.view(ml_dtypes.bfloat16).astype(np.float32)[..., :512].reshape(*kv.shape[:-1], 4, 128)
    )
    scales = np.abs(tiles).max(-1) / np.float32(448)
    quotient = tiles / np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = quotient.astype(E4M3).view(np.uint8).reshape(*kv.shape[:-1], 512)
    np.testing.assert_array_equal(packed[..., :512], codes)
    np.testing.assert_array_equal(packed[..., 512:528].view(np.float32), scales)
    np.testing.assert_array_equal(packed[..., 528:].view(np.uint16), kv[..., 512:])


def test_fp32_matches_the_golden_within_the_division_of_its_source():
    data = golden("sglang_quantize_656")
    ours = np.asarray(to_bytes(quantize(bf16(data["kv_bf16"]), BLOCK, scale_format="fp32")))
    theirs = data["packed"]
    our_scales, their_scales = (p[..., 512:528].copy().view(np.float32) for p in (ours, theirs))
    ulps = our_scales.view(np.int32) - their_scales.view(np.int32)
    assert np.abs(ulps).max() <= 1
    zero = np.repeat(their_scales == 0, 128, axis=-1)
    assert zero.sum() >= 128
    steps = np.abs(ours[..., :512].astype(int) - theirs[..., :512].astype(int))[~zero]
    assert steps.max() <= 1 and (steps != 0).mean() < 0.0014
    np.testing.assert_array_equal(ours[..., 528:], theirs[..., 528:])
    dequantized = np.asarray(dequantize(from_bytes(jnp.asarray(ours), BLOCK, scale_format="fp32")))
    assert not dequantized[..., :512].astype(np.float32)[zero].any()


def test_fp32_dequantises_the_golden_bytes_exactly():
    data = golden("sglang_quantize_656")
    rows = from_bytes(jnp.asarray(data["packed"]), BLOCK, scale_format="fp32")
    np.testing.assert_array_equal(
        np.asarray(dequantize(rows), np.float32),
        data["dequant_bf16"].view(ml_dtypes.bfloat16).astype(np.float32),
    )


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_a_zero_tile_between_others(scale_format):
    x = np.ones((2, 384), np.float32)
    x[:, 128:256] = 0.0
    x[1, 130] = -0.0
    rows = block_rows(x, scale_format)
    scale = 2.0**-13 if scale_format == "pow2" else 0.0
    np.testing.assert_array_equal(rows.scales[:, 1], np.float32(scale))
    codes = np.asarray(to_bytes(rows))[:, 128:256]
    assert codes[1, 2] == 0x80 and (codes == 0).sum() == 255
    np.testing.assert_array_equal(np.asarray(dequantize(rows), np.float32)[:, 128:256], 0.0)


def test_pow2_scale_at_a_power_of_two_and_both_neighbours():
    at = (448 * np.exp2(np.arange(-13.0, 119.0))).astype(np.float32)
    for amax, extra in ((np.nextafter(at, 0), 0), (at, 0), (np.nextafter(at, np.inf), 1)):
        rows = block_rows(np.repeat(amax.astype(np.float32)[:, None], 128, axis=1), "pow2")
        expected = np.exp2(np.arange(-13.0, 119.0) + extra).astype(np.float32)
        np.testing.assert_array_equal(rows.scales[:, 0], expected)
    small = block_rows(np.full((1, 128), 448 * 2.0**-14, np.float32), "pow2")
    np.testing.assert_array_equal(small.scales, np.float32(2.0**-13))


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
@pytest.mark.parametrize("jit", [False, True])
def test_outcome_of_nan_and_infinity(scale_format, jit):
    x = np.full((4, 256), 2.0, np.float32)
    x[0, 3] = np.nan
    x[1, 3], x[1, 4] = np.inf, -np.inf
    x[2, :128] = np.nan
    x[3, 0] = F32.max
    function = lambda x: dequantize(block_rows(x, scale_format))  # noqa: E731
    out = np.asarray((jax.jit(function) if jit else function)(x), np.float32)
    assert np.isnan(out[0, 3]) and np.isnan(out).sum() == 1 + 128
    np.testing.assert_array_equal(np.delete(out[0], 3), 2.0)
    assert out[1, 3] == np.inf and out[1, 4] == -np.inf
    np.testing.assert_array_equal(out[1, [0, *range(5, 128)]], 0.0)
    np.testing.assert_array_equal(out[:, 128:], 2.0)
    assert out[3, 0] == np.inf  # 2^128 is the nearest of the tile's values


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_nothing_saturates_that_fits(scale_format):
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    codes = np.asarray(to_bytes(block_rows(x, scale_format)))[:, :128] & 0x7F
    assert codes.max() <= 0x7E
    exact = np.asarray(block_rows(x, scale_format).scales)
    assert (np.abs(x).max(-1, keepdims=True) <= 448 * exact * (1 + 2**-22)).all()


def test_fp32_scale_that_would_be_subnormal_counts_as_zero():
    x = np.full((1, 128), F32.tiny * 447, np.float32)
    rows = block_rows(x, "fp32")
    assert (rows.scales == 0).all() and not np.asarray(to_bytes(rows)).any()
    normal = block_rows(np.full((1, 128), F32.tiny * 449, np.float32), "fp32")
    assert (normal.scales >= F32.tiny).all()


def test_the_two_rules_are_two_formats():
    x = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
    pow2, fp32 = block_rows(x, "pow2"), block_rows(x, "fp32")
    assert (np.asarray(pow2.scales) != np.asarray(fp32.scales)).all()
    with pytest.raises(TypeError, match="metadata does not match"):
        jax.lax.cond(True, lambda: pow2, lambda: fp32)
