"""Block-scale rows that stay the bytes of another engine."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import Cache, append
from jmla.attention import dense_decode, sparse_decode, sparse_prefill
from jmla.layouts import (
    BlockScaleRows,
    KVLayout,
    PackedBlockScaleRows,
    ScaleFormat,
    convert,
    dequantize,
    from_bytes,
    to_bytes,
)
from tests.attention.cases import SCALE, random_indices, random_queries, same_bits
from tests.helpers import bf16, golden
from tests.layouts.cases import BLOCK, RANK, ROPE_DIM, assert_same_rows, latents, small_rows, u16

WIDTH = RANK + 4 + 2 * ROPE_DIM
formats = pytest.mark.parametrize("scale_format", ["pow2", "fp32"])


def packed_rows(packed: object, scale_format: ScaleFormat) -> PackedBlockScaleRows:
    rows = from_bytes(
        jnp.asarray(packed),
        BLOCK,
        rank=RANK,
        rope_dim=ROPE_DIM,
        scale_format=scale_format,
        in_place=True,
    )
    assert isinstance(rows, PackedBlockScaleRows)
    return rows


def both(scale_format: ScaleFormat, *shape: int) -> tuple[PackedBlockScaleRows, BlockScaleRows]:
    rows = small_rows(scale_format, *shape)
    assert isinstance(rows, BlockScaleRows)
    return packed_rows(to_bytes(rows), scale_format), rows


def test_golden_rows():
    data = golden("fp8_block_scale_pow2")
    rows = from_bytes(jnp.asarray(data["packed"][:, :, 0]), BLOCK, in_place=True)
    assert rows.shape == (3, 64) and rows.bytes_per_token == 656
    np.testing.assert_array_equal(u16(dequantize(rows)), data["dequant_bf16"][:, :, 0])
    encoded = rows.encode(bf16(data["kv_bf16"][:, :, 0]))
    np.testing.assert_array_equal(to_bytes(encoded), data["packed"][:, :, 0])


@formats
@hypothesis.given(data=st.data())
def test_any_bytes_stay_what_they_are(scale_format: ScaleFormat, data: st.DataObject):
    packed = data.draw(hnp.arrays(np.uint8, (2, 3, WIDTH)))
    rows = packed_rows(packed, scale_format)
    rows.check()
    assert rows.shape == (2, 3)
    np.testing.assert_array_equal(to_bytes(rows), packed)
    apart = from_bytes(
        jnp.asarray(packed), BLOCK, rank=RANK, rope_dim=ROPE_DIM, scale_format=scale_format
    )
    assert_same_rows(rows.unpacked(), apart)


@formats
def test_gather_and_set_are_those_of_the_rows_apart(scale_format: ScaleFormat):
    rows, apart = both(scale_format, 3, 5)
    slots = jnp.array([14, -1, 3, 15, 3], jnp.int32)
    assert_same_rows(rows.gather(slots).unpacked(), apart.gather(slots))
    new = latents(5, seed=1)
    slots = jnp.array([14, -1, 3, 15, 0], jnp.int32)
    stored = append(Cache(rows), slots, new).rows
    assert isinstance(stored, PackedBlockScaleRows)
    assert_same_rows(stored.unpacked(), append(Cache(apart), slots, new).rows)
    assert_same_rows(rows.flat().reshape(3, -1), rows)


@formats
def test_every_op_reads_them_as_the_rows_apart(scale_format: ScaleFormat):
    rows, apart = both(scale_format, 12, 16)
    q = random_queries(1, 2, 1, 3, width=RANK + ROPE_DIM)
    few, many = (random_indices(2, 2, 1, topk, slots=192) for topk in (40, 300))
    table, seq_lens = jnp.array([[7, 2], [0, -1]], jnp.int32), jnp.array([30, 9], jnp.int32)

    @jax.jit
    def every_op(rows):
        return (
            sparse_decode(q, rows, few, sm_scale=SCALE, implementation="xla"),
            sparse_decode(q, rows, many, sm_scale=SCALE, implementation="xla"),
            sparse_decode(q, rows, few, sm_scale=SCALE, implementation="reference"),
            sparse_prefill(q[:, 0], rows, few[:, 0], sm_scale=SCALE),
            dense_decode(q, rows, table, seq_lens, sm_scale=SCALE),
        )

    same_bits(every_op(rows), every_op(apart))


def test_xla_unpacks_what_it_gathers_and_not_the_cache():
    rows = jax.eval_shape(
        lambda: from_bytes(jnp.zeros((1 << 16, 656), jnp.uint8), BLOCK, in_place=True)
    )
    q = jax.ShapeDtypeStruct((1, 1, 16, 576), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((1, 1, 64), jnp.int32)
    decode = jax.jit(lambda *a: sparse_decode(*a, sm_scale=SCALE, implementation="xla"))
    analysis = decode.lower(q, rows, indices).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4 << 20  # the cache is 41 MiB


@formats
def test_conversions_unpack_first(scale_format: ScaleFormat):
    rows, apart = both(scale_format, 3, 5)
    slots = jnp.array([4, -1], jnp.int32)
    for layout in KVLayout:
        if layout is not KVLayout.FP8_V4:  # whose blocks of 64 this rank has, too
            assert_same_rows(convert(rows, layout), convert(apart, layout))
        assert_same_rows(convert(rows, layout, slots=slots), convert(apart, layout, slots=slots))
    for other in ("pow2", "fp32"):
        ours, theirs = (convert(each, BLOCK, scale_format=other) for each in (rows, apart))
        assert_same_rows(ours, theirs)


def test_formats_do_not_mix_and_mistakes_are_told():
    rows, apart = both("pow2", 3)
    one = jnp.zeros(1, jnp.int32)
    for other in (both("fp32", 1)[0], small_rows("pow2", 1)):
        with pytest.raises(ValueError, match="expected the format of the cache"):
            rows.set(one, other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"last axis of {WIDTH} bytes"):
        packed_rows(np.zeros((2, WIDTH - 1), np.uint8), "pow2")
    with pytest.raises(ValueError, match="expected uint8"):
        packed_rows(np.zeros((2, WIDTH), np.int8), "pow2")
    with pytest.raises(ValueError, match="no rows that stay packed"):
        from_bytes(jnp.zeros((2, 1152), jnp.uint8), KVLayout.BF16, in_place=True)
    with pytest.raises(ValueError, match="only FP8_V4 packs whole pages"):
        from_bytes(to_bytes(apart), BLOCK, rank=RANK, rope_dim=ROPE_DIM, page_size=2, in_place=True)
