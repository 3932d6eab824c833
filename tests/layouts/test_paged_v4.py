"""FP8_V4 pages that stay the bytes of another engine."""

import dataclasses

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
    KVLayout,
    PagedV4Rows,
    V4Rows,
    convert,
    dequantize,
    from_bytes,
    to_bytes,
)
from tests.attention.cases import SCALE, random_indices, random_queries, same_bits
from tests.helpers import bf16, golden
from tests.layouts.cases import RANK, ROPE_DIM, assert_same_rows, latents, small_rows, u16

V4 = KVLayout.FP8_V4
ROW = RANK + 2 * ROPE_DIM + 8
INT32 = np.iinfo(np.int32)


def paged_rows(packed: object, page_size: int) -> PagedV4Rows:
    rows = from_bytes(
        jnp.asarray(packed), V4, rank=RANK, rope_dim=ROPE_DIM, page_size=page_size, in_place=True
    )
    assert isinstance(rows, PagedV4Rows)
    return rows


def both(pages: int, page_size: int, *, spare: int = 24) -> tuple[PagedV4Rows, V4Rows]:
    rows = small_rows("v4", pages, page_size)
    assert isinstance(rows, V4Rows)
    return paged_rows(to_bytes(rows, page_bytes=page_size * ROW + spare), page_size), rows


def test_golden_pages():
    data = golden("v4_584")
    packed = jnp.asarray(data["packed"])
    rows = from_bytes(packed, V4, page_size=64, in_place=True)
    assert rows.shape == (len(packed), 64) and rows.bytes_per_token == 584
    np.testing.assert_array_equal(u16(dequantize(rows)), data["dequant_bf16"][:, :, 0])
    new = rows.encode(bf16(data["kv_bf16"][:, :, 0])).flat()
    written = from_bytes(jnp.zeros_like(packed), V4, page_size=64, in_place=True).set(
        jnp.arange(new.num_slots, dtype=jnp.int32), new
    )
    np.testing.assert_array_equal(to_bytes(written), data["packed"])


@hypothesis.given(data=st.data(), shape=st.sampled_from([(1, 0), (3, 9), (5, 1)]))
def test_any_bytes_stay_what_they_are(data: st.DataObject, shape: tuple[int, int]):
    page_size, spare = shape
    packed = data.draw(hnp.arrays(np.uint8, (2, page_size * ROW + spare)))
    rows = paged_rows(packed, page_size)
    rows.check()
    assert rows.shape == (2, page_size)
    np.testing.assert_array_equal(to_bytes(rows), packed)
    apart = from_bytes(jnp.asarray(packed), V4, rank=RANK, rope_dim=ROPE_DIM, page_size=page_size)
    assert_same_rows(rows.unpacked(), apart)
    gathered = rows.gather(jnp.arange(2 * page_size, dtype=jnp.int32)[::-1])
    assert isinstance(gathered, PagedV4Rows)
    assert_same_rows(gathered.unpacked(), jax.tree.map(lambda x: x[::-1], apart.flat()))


@hypothesis.given(
    slots=st.lists(
        st.one_of(st.integers(-8, 20), st.sampled_from([INT32.min, INT32.max])),
        min_size=5,
        max_size=5,
        unique=True,
    )
)
def test_gather_and_set_are_those_of_the_rows_apart(slots: list[int]):
    rows, apart = both(3, 5)
    where = jnp.asarray(slots, jnp.int32)
    gathered = rows.gather(where)
    assert gathered.shape == (5,)
    assert_same_rows(gathered.unpacked(), apart.gather(where))
    again = jnp.array([4, -1, 0], jnp.int32)
    assert_same_rows(gathered.gather(again).unpacked(), apart.gather(where).gather(again))
    new = latents(5, seed=1)
    stored = append(Cache(rows), where, new).rows
    assert isinstance(stored, PagedV4Rows)
    assert_same_rows(stored.unpacked(), append(Cache(apart), where, new).rows)
    spare = np.asarray(stored.packed)[:, 5 * ROW :]
    np.testing.assert_array_equal(spare, np.asarray(rows.packed)[:, 5 * ROW :])


def test_every_op_reads_them_as_the_rows_apart():
    rows, apart = both(12, 16)
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
        lambda: from_bytes(jnp.zeros((1 << 10, 37440), jnp.uint8), V4, page_size=64, in_place=True)
    )
    q = jax.ShapeDtypeStruct((1, 1, 16, 512), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((1, 1, 64), jnp.int32)
    decode = jax.jit(lambda *a: sparse_decode(*a, sm_scale=SCALE, implementation="xla"))
    analysis = decode.lower(q, rows, indices).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4 << 20  # the cache is 37 MiB


def test_an_update_is_in_place():
    rows = jax.eval_shape(
        lambda: from_bytes(jnp.zeros((1 << 10, 37440), jnp.uint8), V4, page_size=64, in_place=True)
    )
    new = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((16,), jnp.int32)
    program = jax.jit(append, donate_argnums=0).lower(Cache(rows), slots, new).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == 37440 << 10
    assert analysis.temp_size_in_bytes < 1 << 20


def test_conversions_unpack_first():
    rows, apart = both(3, 5)
    slots = jnp.array([4, -1], jnp.int32)
    for layout in KVLayout:
        assert_same_rows(convert(rows, layout), convert(apart, layout))
        assert_same_rows(convert(rows, layout, slots=slots), convert(apart, layout, slots=slots))


def test_shapes_and_mistakes():
    rows, apart = both(3, 5)
    assert (rows.num_slots, rows.width, rows.value_dim) == (15, RANK + ROPE_DIM, RANK + ROPE_DIM)
    assert rows.flat().shape == (3, 5) and rows.reshape(1, 3, 5).shape == (1, 3, 5)
    with pytest.raises(ValueError, match="stay in their pages"):
        rows.reshape(15)
    one = jnp.zeros(1, jnp.int32)
    for other in (small_rows("v4", 1), rows, dataclasses.replace(rows.gather(one), rank=RANK + 64)):
        with pytest.raises(ValueError, match="expected the format of the cache"):
            rows.set(one, other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one row per slot"):
        rows.set(one, rows.gather(jnp.zeros(2, jnp.int32)))
    with pytest.raises(ValueError, match="expected int32"):
        rows.gather(one.astype(jnp.int8))
    with pytest.raises(ValueError, match="tokens in an FP8_V4 page"):
        from_bytes(rows.packed, V4, rank=RANK, rope_dim=ROPE_DIM, in_place=True)
    with pytest.raises(ValueError, match=f"last axis of {5 * ROW} bytes"):
        paged_rows(np.zeros((2, 5 * ROW - 1), np.uint8), 5)
    with pytest.raises(ValueError, match="PagedV4Rows"):
        dequantize(dataclasses.replace(rows, packed=rows.packed[:, : 5 * ROW - 1]))
    np.testing.assert_array_equal(
        to_bytes(rows, page_bytes=5 * ROW + 8), to_bytes(apart, page_bytes=5 * ROW + 8)
    )


def test_no_pages_at_all():
    rows = paged_rows(np.zeros((0, 5 * ROW), np.uint8), 5)
    gathered = rows.gather(jnp.array([0, -1], jnp.int32))
    np.testing.assert_array_equal(dequantize(gathered).astype(jnp.float32), 0.0)
    assert_same_rows(
        rows.set(jnp.zeros(1, jnp.int32), gathered.gather(jnp.zeros(1, jnp.int32))), rows
    )
