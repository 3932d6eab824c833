"""FP8_NOPE_FP8_ROPE and the byte-exact repacking of it to block scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.layouts import (
    BlockScaleRows,
    FP8Rows,
    KVLayout,
    convert,
    dequantize,
    from_bytes,
    quantize,
    to_bytes,
)
from tests.helpers import golden
from tests.layouts.cases import (
    BLOCK,
    RAW,
    ROPE_DIM,
    assert_same_rows,
    latents,
    quantized,
    read,
    small_rows,
    u16,
)


def every_code() -> jax.Array:
    """u8 [4, 576] that holds each of the 256 codes in the nope and in the rope part."""
    codes = np.arange(256, dtype=np.uint8)
    nope = np.tile(codes, (4, 2))
    return jnp.asarray(np.concatenate([nope, codes.reshape(4, 64)], axis=-1))


def test_repacking_matches_the_golden_bytes():
    data = golden("requantize_raw_to_656")
    rows = from_bytes(jnp.asarray(data["raw"]), RAW)
    assert rows.shape == (10, 64, 1)
    packed = to_bytes(convert(rows, BLOCK))
    np.testing.assert_array_equal(packed, data["packed"])
    np.testing.assert_array_equal(to_bytes(rows), data["raw"])


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_repacking_keeps_every_code_and_nan(scale_format):
    rows = from_bytes(every_code(), RAW)
    block = convert(rows, BLOCK, scale_format=scale_format)
    assert isinstance(block, BlockScaleRows) and block.scale_format == scale_format
    np.testing.assert_array_equal(to_bytes(block)[:, :512], every_code()[:, :512])
    ours, theirs = (np.asarray(dequantize(r), np.float32) for r in (block, rows))
    np.testing.assert_array_equal(ours, theirs)
    assert np.isnan(ours).sum() == 4 * 4 + 2


def test_repacking_with_a_scale_keeps_codes_and_values():
    rows = from_bytes(every_code(), RAW, scale=0.3)
    block = convert(rows, BLOCK, scale_format="fp32")
    assert isinstance(block, BlockScaleRows)
    np.testing.assert_array_equal(to_bytes(block)[:, :512], every_code()[:, :512])
    np.testing.assert_array_equal(block.scales, np.full((4, 4), 0.3, np.float32))
    ours, theirs = (np.asarray(dequantize(r), np.float32) for r in (block, rows))
    np.testing.assert_array_equal(ours, theirs)


def test_a_scale_does_not_become_a_power_of_two():
    rows = small_rows("fp8_scale", 2)
    with pytest.raises(ValueError, match="expected 'fp32'"):
        convert(rows, BLOCK)
    with pytest.raises(ValueError, match="expected 'fp32'"):
        convert(rows, BLOCK, scale_format="pow2")


def test_repacking_chosen_slots_only():
    rows = small_rows("fp8", 3, 4)
    slots = jnp.array([[7, -1, 12], [0, 11, 7]], jnp.int32)
    chosen = convert(rows, BLOCK, slots=slots)
    assert chosen.shape == (2, 3)
    expected = u16(convert(rows, BLOCK).gather(slots).dequantize())
    np.testing.assert_array_equal(u16(dequantize(chosen)), expected)
    assert not expected[0, 1].any() and not expected[0, 2].any()


def test_outcome_of_values_that_have_no_code():
    x = jnp.array([[448, 449, 1e30, jnp.inf, -jnp.inf, jnp.nan, -0.0, 1e-9]], jnp.float32)
    rows = quantize(x, RAW, rope_dim=0)
    assert isinstance(rows, FP8Rows) and rows.scale is None
    codes = np.asarray(to_bytes(rows))[0]
    np.testing.assert_array_equal(codes[[0, 1, 2, 3, 4]], [0x7E, 0x7E, 0x7E, 0x7E, 0xFE])
    assert codes[5] & 0x7F == 0x7F
    np.testing.assert_array_equal(codes[6:], [0x80, 0x00])


def test_the_scale_multiplies_every_value():
    x = latents(5)
    rows = quantize(x, RAW, rope_dim=ROPE_DIM, scale=4.0)
    by_hand = quantize(x.astype(jnp.float32) / 4, RAW, rope_dim=ROPE_DIM)
    np.testing.assert_array_equal(to_bytes(rows), to_bytes(by_hand))
    expected = np.asarray(dequantize(by_hand), np.float32) * 4
    np.testing.assert_array_equal(np.asarray(dequantize(rows), np.float32), expected)
    infinite = quantize(jnp.full((1, 20), jnp.inf, jnp.bfloat16), RAW, rope_dim=ROPE_DIM, scale=4.0)
    np.testing.assert_array_equal(np.asarray(dequantize(infinite), np.float32), 448 * 4)


def test_the_scale_stays_with_the_tensor():
    rows = small_rows("fp8_scale", 4)
    slots = jnp.array([1, -1], jnp.int32)
    assert isinstance(rows, FP8Rows)
    for derived in (rows.gather(slots), rows.reshape(2, 2), rows.set(slots, rows.gather(slots))):
        assert derived.scale is rows.scale


def test_a_traced_scale_is_one_program_for_all_its_values():
    traces = []

    @jax.jit
    def store(x: jax.Array, scale: jax.Array) -> jax.Array:
        traces.append(1)
        return quantize(x, RAW, rope_dim=ROPE_DIM, scale=scale).dequantize()

    x = latents(3)
    for scale in (0.5, 2.0):
        expected = dequantize(quantize(x, RAW, rope_dim=ROPE_DIM, scale=scale))
        np.testing.assert_array_equal(u16(store(x, jnp.float32(scale))), u16(expected))
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_scale", "pow2", "fp32", "fp4", "v4"])
def test_same_layout_is_the_same_rows(name):
    rows = small_rows(name, 4)
    assert_same_rows(convert(rows, rows.layout), rows)
    slots = jnp.array([3, 9], jnp.int32)
    assert_same_rows(convert(rows, rows.layout, slots=slots), rows.gather(slots))


@pytest.mark.parametrize("source", ["bf16", "fp8", "fp8_scale", "pow2", "fp32", "fp4", "v4"])
@pytest.mark.parametrize("target", list(KVLayout))
def test_other_pairs_dequantise_and_quantise(source, target):
    rows = small_rows(source, 6)
    if rows.layout is target or (rows.layout is RAW and target is BLOCK):
        return  # exact conversions, tested by name
    # One program for both halves: the rounding to bf16 between them must survive that.
    converted = jax.jit(lambda rows: convert(rows, target))(rows)
    assert_same_rows(converted, quantized(read(rows), target))


def test_scale_format_between_block_scale_rows():
    pow2, fp32 = small_rows("pow2", 4), small_rows("fp32", 4)
    relabelled = convert(pow2, BLOCK, scale_format="fp32")
    assert isinstance(relabelled, BlockScaleRows) and relabelled.scale_format == "fp32"
    np.testing.assert_array_equal(to_bytes(relabelled), to_bytes(pow2))
    again = convert(fp32, BLOCK, scale_format="pow2")
    assert_same_rows(again, quantize(dequantize(fp32), BLOCK, rope_dim=ROPE_DIM))


def test_a_new_scale_requantises():
    rows = convert(small_rows("fp8", 4), RAW, scale=0.25)
    expected = quantize(dequantize(small_rows("fp8", 4)), RAW, rope_dim=ROPE_DIM, scale=0.25)
    assert_same_rows(rows, expected)


def test_check_refuses_a_scale_that_is_not_one_number():
    rows = small_rows("fp8_scale", 3)
    for scale in (jnp.ones(3), jnp.ones((), jnp.bfloat16)):
        with pytest.raises(ValueError, match="expected an f32 scalar"):
            dequantize(dataclasses.replace(rows, scale=scale))  # type: ignore[call-arg]
