"""What all rows share: shapes, access by slot, and life as a pytree."""

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.layouts import (
    BF16Rows,
    IndexKeyRows,
    KVLayout,
    Rows,
    convert,
    dequantize,
    from_bytes,
    quantize,
    quantize_index_keys,
    to_bytes,
    zero_rows,
)
from tests.layouts.cases import (
    FORMATS,
    RANK,
    ROPE_DIM,
    assert_same_rows,
    latents,
    quantized,
    read,
    small_rows,
    u16,
)

INT32 = np.iinfo(np.int32)
gather = jax.jit(lambda rows, slots: rows.gather(slots))
put = jax.jit(lambda rows, slots, new: rows.set(slots, new))
formats = pytest.mark.parametrize("name", FORMATS)


def test_bytes_per_token_are_those_of_the_published_rows():
    assert {layout.name: layout.bytes_per_token() for layout in KVLayout} == {
        "BF16": 1152,
        "FP8_NOPE_FP8_ROPE": 576,
        "FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE": 656,
        "FP4": 324,
        "FP8_V4": 584,
    }
    block = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
    assert block.bytes_per_token(rope_dim=0) == 528
    assert block.bytes_per_token(256, 0) == 264


@formats
def test_packed_rows_have_the_stated_size(name):
    rows = small_rows(name, 3, 5)
    assert rows.bytes_per_token == rows.layout.bytes_per_token(RANK, ROPE_DIM)
    packed = to_bytes(rows) if name != "v4" else to_bytes(rows, page_bytes=5 * rows.bytes_per_token)
    assert packed.size == 15 * rows.bytes_per_token and packed.dtype == jnp.uint8


@formats
def test_shapes(name):
    rows = small_rows(name, 3, 5)
    assert (rows.shape, rows.num_slots, rows.width) == ((3, 5), 15, RANK + ROPE_DIM)
    assert rows.value_dim == (rows.width if rows.layout is KVLayout.FP8_V4 else RANK)
    assert rows.flat().shape == (15,)
    assert_same_rows(rows.flat().reshape(3, -1), rows)
    assert rows.reshape(5, 1, 3).shape == (5, 1, 3)
    assert dequantize(rows).shape == (3, 5, rows.width)
    with pytest.raises(ValueError, match="product 15"):
        rows.reshape(4, -1)
    with pytest.raises(ValueError, match="product 15"):
        rows.reshape(-3, -5)


@formats
def test_no_rows_at_all(name):
    rows = small_rows(name, 0, 4)
    assert rows.flat().shape == (0,) and rows.reshape(-1, 4).shape == (0, 4)
    gathered = rows.gather(jnp.array([0, -1, 5], jnp.int32))
    np.testing.assert_array_equal(dequantize(gathered).astype(jnp.float32), 0.0)
    assert_same_rows(rows.set(jnp.array([0], jnp.int32), small_rows(name, 1)), rows)
    assert rows.gather(jnp.zeros((0,), jnp.int32)).shape == (0,)


@formats
@hypothesis.given(
    slots=st.lists(
        st.one_of(
            st.integers(-8, 14),
            st.sampled_from([INT32.min, INT32.max, INT32.min + 1, 2_147_480_000]),
        ),
        min_size=6,
        max_size=6,
    )
)
def test_gather_takes_valid_slots_and_gives_zeros_for_the_others(name, slots):
    rows = small_rows(name, 3, 2)
    valid = np.array([0 <= slot < 6 for slot in slots])
    gathered = gather(rows, jnp.asarray(slots, jnp.int32).reshape(2, 3))
    assert gathered.shape == (2, 3)
    expected = np.where(valid[:, None], u16(read(rows)).reshape(6, -1)[np.clip(slots, 0, 5)], 0)
    np.testing.assert_array_equal(u16(read(gathered)).reshape(6, -1), expected)


@formats
@hypothesis.given(
    slots=st.lists(
        st.one_of(st.integers(-8, 14), st.sampled_from([INT32.min, INT32.max])),
        min_size=4,
        max_size=4,
        unique=True,
    )
)
def test_set_stores_valid_slots_and_drops_the_others(name, slots):
    rows, new = small_rows(name, 3, 2), small_rows(name, 4, seed=1)
    stored = put(rows, jnp.asarray(slots, jnp.int32), new)
    assert stored.shape == (3, 2)
    expected = u16(read(rows)).reshape(6, -1).copy()
    for slot, row in zip(slots, u16(read(new)), strict=True):
        if 0 <= slot < 6:
            expected[slot] = row
    np.testing.assert_array_equal(u16(read(stored)).reshape(6, -1), expected)


@formats
def test_gather_and_set_move_every_byte_unchanged(name):
    rows = small_rows(name, 256)
    poisoned = jax.tree.map(
        lambda leaf: leaf if leaf.ndim == 0 else _every_byte(leaf.shape, leaf.dtype), rows
    )
    slots = jnp.arange(256, dtype=jnp.int32)[::-1]
    moved = jax.jit(lambda rows: rows.set(slots, rows).gather(slots))(poisoned)
    assert_same_rows(moved, poisoned)


def _every_byte(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    count = int(np.prod(shape)) * dtype.itemsize
    return jnp.asarray(np.resize(np.arange(256, dtype=np.uint8), count).view(dtype).reshape(shape))


@formats
def test_a_gathered_row_outside_the_cache_is_zero_even_if_every_row_is_nan(name):
    rows = quantize(
        jnp.full((4, RANK + ROPE_DIM), jnp.nan, jnp.bfloat16),
        FORMATS[name][0],
        rope_dim=ROPE_DIM,
        **FORMATS[name][1],
    )
    assert np.isnan(np.asarray(read(rows), np.float32)).all()
    gathered = rows.gather(jnp.array([-1, 4, INT32.min, INT32.max], jnp.int32))
    np.testing.assert_array_equal(np.asarray(read(gathered), np.float32), 0.0)


def test_slots_must_be_int32():
    rows = small_rows("bf16", 3)
    for slots in (jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.int8)):
        with pytest.raises(ValueError, match="expected int32"):
            rows.gather(slots)
        with pytest.raises(ValueError, match="expected int32"):
            rows.set(slots, rows.gather(jnp.zeros(1, jnp.int32)))


def test_formats_of_equal_shape_cannot_be_mixed():
    one = jnp.zeros(1, jnp.int32)
    for ours, theirs in (("pow2", "fp32"), ("fp32", "pow2"), ("fp8", "fp8_scale")):
        with pytest.raises(ValueError, match="expected the format of the cache"):
            small_rows(ours, 3).set(one, small_rows(theirs, 1))
    other_split = quantize(latents(1), KVLayout.BF16, rank=RANK + 8, rope_dim=ROPE_DIM - 8)
    assert isinstance(other_split, BF16Rows)
    with pytest.raises(ValueError, match="expected the format of the cache"):
        small_rows("bf16", 3).set(one, other_split)
    with pytest.raises(ValueError, match="one row per slot"):
        small_rows("bf16", 3).set(one, small_rows("bf16", 2))
    keys = quantize_index_keys(latents(1))
    cache = IndexKeyRows.zeros((3,), dim=RANK + ROPE_DIM, scale_format="pow2")
    with pytest.raises(ValueError, match="expected the format of the cache"):
        cache.set(one, keys)


@formats
def test_pytree_survives_leaves_that_are_not_arrays(name):
    rows = small_rows(name, 3, 5)
    leaves, tree = jax.tree.flatten(rows)
    assert jax.tree.unflatten(tree, [None] * len(leaves)).layout is rows.layout
    jax.tree.unflatten(tree, [object()] * len(leaves))
    abstract = jax.eval_shape(lambda rows: rows.flat().gather(jnp.zeros(2, jnp.int32)), rows)
    assert abstract.shape == (2,) and abstract.rank == RANK
    assert hash(tree) == hash(jax.tree.structure(small_rows(name, 1)))


@formats
def test_check_names_the_leaf_that_does_not_fit(name):
    rows = small_rows(name, 3)
    rows.check()
    for leaf in rows.token_leaves:
        for bad in (getattr(rows, leaf)[..., :-1], getattr(rows, leaf).astype(jnp.int32)):
            broken = dataclasses.replace(rows, **{leaf: bad})
            for use in (dequantize, to_bytes, lambda r: convert(r, KVLayout.BF16)):
                with pytest.raises(ValueError, match=f"{type(rows).__name__}"):
                    use(broken)


@formats
def test_jit_gives_the_bits_of_eager(name):
    layout, options = FORMATS[name]

    def both(x: jax.Array) -> tuple[Rows, jax.Array]:
        rows = quantize(x, layout, rope_dim=ROPE_DIM, **options)
        return rows, rows.dequantize()

    x = latents(7, 3).astype(jnp.float32) * jnp.float32(1.0001)
    assert_same_rows(jax.jit(both)(x), both(x))


@formats
def test_rounding_to_bf16_is_kept_when_fused_with_what_follows(name):
    rows = small_rows(name, 32)
    eager = dequantize(rows).astype(jnp.float32)
    fused = jax.jit(lambda rows: dequantize(rows).astype(jnp.float32))(rows)
    np.testing.assert_array_equal(fused, eager)


@formats
def test_vmap_over_caches(name):
    layout, options = FORMATS[name]
    x = latents(3, 6)
    slots = jnp.array([[0, 5], [-1, 2], [3, 7]], jnp.int32)

    def one(x: jax.Array, slots: jax.Array) -> tuple[Rows, jax.Array]:
        rows = quantize(x, layout, rope_dim=ROPE_DIM, **options)
        changed = rows.set(slots, rows.gather(jnp.array([1, 4], jnp.int32)))
        return changed, changed.gather(slots).dequantize()

    def at(batched: Any, i: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[i], batched)

    batched, alone = jax.jit(jax.vmap(one))(x, slots), jax.jit(one)
    for i in range(3):
        assert_same_rows(at(batched, i), alone(x[i], slots[i]))


@formats
def test_export(name):
    layout, options = FORMATS[name]

    def step(x: jax.Array, slots: jax.Array) -> jax.Array:
        rows = quantize(x, layout, rope_dim=ROPE_DIM, **options)
        return rows.gather(slots).dequantize()

    x, slots = latents(5), jnp.array([4, -1], jnp.int32)
    exported = jax.export.export(jax.jit(step))(x, slots)
    np.testing.assert_array_equal(u16(exported.call(x, slots)), u16(step(x, slots)))


@formats
def test_zero_rows_are_zero(name):
    layout, options = FORMATS[name]
    rows = zero_rows(layout, (2, 3), rank=RANK, rope_dim=ROPE_DIM, **options)
    rows.check()
    assert rows.shape == (2, 3)
    assert not u16(read(rows)).any()


@pytest.mark.parametrize(
    ("layout", "rank", "rope_dim"),
    [
        (KVLayout.BF16, 0, 4),
        (KVLayout.BF16, 4, -1),
        (KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, 64, 64),
        (KVLayout.FP4, 24, 16),
        (KVLayout.FP4, 32, 8),
        (KVLayout.FP8_V4, 96, 64),
    ],
)
def test_a_layout_that_is_not_defined_for_a_rank_says_so(layout, rank, rope_dim):
    with pytest.raises(ValueError, match="expects a"):
        zero_rows(layout, (1,), rank=rank, rope_dim=rope_dim)


@formats
def test_rope_dim_zero(name):
    layout, options = FORMATS[name]
    rows = quantized(latents(6, width=RANK), layout, rope_dim=0, **options)
    stride = {"page_bytes": 6 * rows.bytes_per_token} if name == "v4" else {}
    page_size = 6 if name == "v4" else None
    packed = to_bytes(rows, **stride)
    again = from_bytes(packed, layout, rank=RANK, rope_dim=0, page_size=page_size, **options)
    assert_same_rows(again, rows)
    assert rows.gather(jnp.array([5, -1], jnp.int32)).dequantize().shape == (2, RANK)
    assert_same_rows(rows.set(jnp.arange(6, dtype=jnp.int32), rows), rows)
    assert rows.flat().reshape(2, -1).shape == (2, 3)


def test_wrong_arguments_say_what_was_expected():
    x = latents(2)
    with pytest.raises(ValueError, match="expected bfloat16 or float32"):
        quantize(x.astype(jnp.float16), KVLayout.BF16, rope_dim=ROPE_DIM)
    with pytest.raises(ValueError, match="expected a last axis of 80"):
        quantize(x, KVLayout.BF16, rank=64, rope_dim=ROPE_DIM)
    with pytest.raises(ValueError, match="rank"):
        quantize(x, KVLayout.BF16, rope_dim=RANK + ROPE_DIM)
    with pytest.raises(ValueError, match="has no scale for the tensor"):
        quantize(x, KVLayout.FP4, rope_dim=ROPE_DIM, scale=1.0)
    with pytest.raises(ValueError, match="expected a scalar"):
        quantize(x, KVLayout.FP8_NOPE_FP8_ROPE, rope_dim=ROPE_DIM, scale=jnp.ones(2))
    with pytest.raises(ValueError, match="expected 'pow2'"):
        quantize(
            x,
            KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE,
            rope_dim=ROPE_DIM,
            scale_format="ue8m0",  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match="expected uint8"):
        from_bytes(jnp.zeros((2, 1152), jnp.int8), KVLayout.BF16)
    with pytest.raises(ValueError, match="1152 bytes"):
        from_bytes(jnp.zeros((2, 1151), jnp.uint8), KVLayout.BF16)
    with pytest.raises(ValueError, match="only FP8_V4 packs whole pages"):
        from_bytes(jnp.zeros((2, 1152), jnp.uint8), KVLayout.BF16, page_size=2)
    with pytest.raises(ValueError, match="only FP8_V4 packs whole pages"):
        to_bytes(small_rows("fp4", 2), page_bytes=648)
