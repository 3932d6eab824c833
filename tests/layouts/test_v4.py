"""The 584-byte rows in split pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.layouts import KVLayout, V4Rows, dequantize, from_bytes, quantize, to_bytes
from tests.helpers import bf16, golden
from tests.layouts.cases import assert_same_rows, latents, small_rows, u16

V4 = KVLayout.FP8_V4


@pytest.mark.parametrize("jit", [False, True])
def test_golden_pages(jit):
    data = golden("v4_584")
    pack = lambda x: to_bytes(quantize(x, V4), page_bytes=64 * 584)  # noqa: E731
    read = lambda packed: dequantize(from_bytes(packed, V4, page_size=64))  # noqa: E731
    pack, read = (jax.jit(pack), jax.jit(read)) if jit else (pack, read)
    np.testing.assert_array_equal(pack(bf16(data["kv_bf16"][:, :, 0])), data["packed"])
    np.testing.assert_array_equal(
        u16(read(jnp.asarray(data["packed"]))), data["dequant_bf16"][:, :, 0]
    )


@pytest.mark.parametrize("case", ["sparse_decode_4", "sparse_decode_5"])
def test_pages_of_the_attention_cases_round_trip(case):
    data = golden(case)
    pages = [(data["packed"], int(data["block_size"]))]
    if "extra_packed" in data:
        pages.append((data["extra_packed"], int(data["extra_block_size"])))
    for packed, page_size in pages:
        rows = from_bytes(jnp.asarray(packed), V4, page_size=page_size)
        assert rows.shape == (len(packed), page_size)
        again = np.asarray(to_bytes(rows, page_bytes=packed.shape[-1]))
        footer = page_size * 576
        np.testing.assert_array_equal(again[:, :footer], packed[:, :footer])
        ours, theirs = (p[:, footer:].reshape(-1, page_size, 8) for p in (again, packed))
        np.testing.assert_array_equal(ours[..., :7], theirs[..., :7])
        assert not ours[..., 7].any()


@pytest.mark.parametrize(
    ("page_size", "stride"), [(64, 37440), (1, 1152), (2, 1728), (53, 31104), (72, 42048)]
)
def test_default_stride_is_a_multiple_of_576(page_size, stride):
    rows = quantize(latents(2, page_size, width=512), V4)
    packed = np.asarray(to_bytes(rows))
    assert packed.shape == (2, stride)
    assert not packed[:, page_size * 584 :].any()
    assert_same_rows(from_bytes(jnp.asarray(packed), V4, page_size=page_size), rows)
    garbage = packed.copy()
    garbage[:, page_size * 584 :] = 0xFF
    garbage[:, page_size * 576 : page_size * 584].reshape(2, page_size, 8)[..., 7] = 0xFF
    assert_same_rows(from_bytes(jnp.asarray(garbage), V4, page_size=page_size), rows)


def test_where_each_byte_of_a_page_lies():
    rows = quantize(latents(1, 3, width=512), V4)
    assert isinstance(rows, V4Rows)
    page = np.asarray(to_bytes(rows, page_bytes=3 * 584))[0]
    for token in range(3):
        start = token * 576
        np.testing.assert_array_equal(
            page[start : start + 448], np.asarray(rows.nope[0, token]).view(np.uint8)
        )
        np.testing.assert_array_equal(
            page[start + 448 : start + 576], np.asarray(rows.rope[0, token]).view(np.uint8)
        )
        footer = 3 * 576 + token * 8
        np.testing.assert_array_equal(page[footer : footer + 7], rows.exponents[0, token])
        assert page[footer + 7] == 0


def test_outcome_of_nan_and_infinity():
    x = np.full((2, 512), 2.0, np.float32)
    x[0, 3], x[0, 500] = np.nan, np.nan
    x[1, 70], x[1, 71] = np.inf, -np.inf
    out = np.asarray(dequantize(quantize(jnp.asarray(x), V4)), np.float32)
    assert set(np.flatnonzero(np.isnan(out[0]))) == {3, 500} and not np.isnan(out[1]).any()
    assert out[1, 70] == np.inf and out[1, 71] == -np.inf
    np.testing.assert_array_equal(out[1, [*range(64), *range(128, 512)]], 2.0)
    np.testing.assert_array_equal(out[1, 72:128], 0.0)


def test_exponent_at_a_power_of_two_and_both_neighbours():
    steps = np.arange(-13, 119)
    at = (448 * np.exp2(steps.astype(np.float64))).astype(np.float32)
    for amax, extra in ((np.nextafter(at, 0), 0), (at, 0), (np.nextafter(at, np.inf), 1)):
        rows = quantize(jnp.asarray(np.repeat(amax[:, None], 64, axis=1)), V4, rope_dim=0)
        assert isinstance(rows, V4Rows)
        np.testing.assert_array_equal(rows.exponents[:, 0], steps + extra + 127)
    zero = quantize(jnp.zeros((1, 64), jnp.bfloat16), V4, rope_dim=0)
    assert isinstance(zero, V4Rows) and (zero.exponents == 127 - 13).all()


def test_wrong_pages_say_what_was_expected():
    with pytest.raises(ValueError, match="expected the number of tokens"):
        from_bytes(jnp.zeros((1, 37440), jnp.uint8), V4)
    with pytest.raises(ValueError, match="at least 37376 bytes"):
        from_bytes(jnp.zeros((1, 37375), jnp.uint8), V4, page_size=64)
    with pytest.raises(ValueError, match="expected uint8"):
        from_bytes(jnp.zeros((1, 37440), jnp.int8), V4, page_size=64)
    with pytest.raises(ValueError, match="at least 37376"):
        to_bytes(quantize(latents(1, 64, width=512), V4), page_bytes=37375)
    with pytest.raises(ValueError, match="end in a page"):
        to_bytes(small_rows("v4"))
