"""The paged cache: creation, writes of several requests, and updates in place."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.cache import Cache, append, init_cache
from jmla.layouts import BF16Rows, KVLayout, quantize_index_keys
from tests.layouts.cases import (
    FORMATS,
    RANK,
    ROPE_DIM,
    assert_same_rows,
    latents,
    quantized,
    read,
    u16,
)
from tests.layouts.raw import assert_prepared, raw_latents

formats = pytest.mark.parametrize("name", FORMATS)
INDEX_DIM = 32


def new_cache(name: str, *, num_pages: int = 5, page_size: int = 4, rank: int = RANK) -> Cache:
    layout, options = FORMATS[name]
    return init_cache(
        layout,
        num_pages=num_pages,
        page_size=page_size,
        rank=rank,
        rope_dim=ROPE_DIM,
        index_dim=INDEX_DIM,
        **options,
    )


def test_properties():
    cache = init_cache(KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, num_pages=3, index_dim=128)
    assert (cache.num_pages, cache.page_size, cache.num_slots) == (3, 64, 192)
    assert cache.bytes_per_token == 656 + 132
    assert init_cache(KVLayout.FP8_V4, num_pages=1).bytes_per_token == 584
    assert init_cache(KVLayout.FP8_V4, num_pages=1).rows.rank == 448
    assert init_cache(KVLayout.BF16, num_pages=0, page_size=7).num_slots == 0
    assert cache.layout is KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE


@pytest.mark.parametrize(("name", "jit"), [*((name, True) for name in FORMATS), ("pow2", False)])
def test_append_of_several_requests_over_scattered_pages(name, jit):
    layout, options = FORMATS[name]
    cache = new_cache(name)
    write = jax.jit(append) if jit else append
    stored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    # Request A owns pages 3 and 0, request B page 4; -1 is padding, 20 and above are no slots.
    steps = [[12, 13, 14, 15, 0, 1, 16, 17], [2, 18, -1, -1, 20, 2**31 - 1, -(2**31), 19]]
    for seed, step in enumerate(steps):
        x = latents(len(step), seed=seed)
        keys = latents(len(step), seed=seed + 9, width=INDEX_DIM)
        cache = write(cache, jnp.asarray(step, jnp.int32), x, keys)
        rows = u16(read(quantized(x, layout, **options)))
        index_rows = u16(quantize_index_keys(keys).dequantize())
        stored |= {s: (r, k) for s, r, k in zip(step, rows, index_rows, strict=True) if 0 <= s < 20}
    assert cache.rows.shape == (5, 4) and cache.index_keys is not None
    ours = u16(read(cache.rows)).reshape(20, -1)
    our_keys = u16(cache.index_keys.dequantize()).reshape(20, -1)
    for slot in range(20):
        row, key = stored.get(slot, (np.zeros_like(ours[0]), np.zeros_like(our_keys[0])))
        np.testing.assert_array_equal(ours[slot], row)
        np.testing.assert_array_equal(our_keys[slot], key)


@formats
def test_append_in_pieces_gives_the_same_bytes(name):
    x, keys = latents(12), latents(12, seed=3, width=INDEX_DIM)
    slots = jnp.asarray(np.random.default_rng(0).permutation(20)[:12], jnp.int32)
    write = jax.jit(append)
    whole = write(new_cache(name), slots, x, keys)
    pieces = new_cache(name)
    for part in (slice(0, 1), slice(1, 8), slice(8, 8), slice(8, 12)):
        pieces = write(pieces, slots[part], x[part], keys[part])
    assert_same_rows(pieces, whole)


@formats
def test_append_nothing(name):
    cache = new_cache(name)
    none = jnp.zeros((0,), jnp.int32)
    same = append(cache, none, latents(0), jnp.zeros((0, INDEX_DIM), jnp.bfloat16))
    assert_same_rows(same, cache)
    no_pages = append(new_cache(name, num_pages=0), none, latents(0), latents(0, width=INDEX_DIM))
    assert no_pages.num_slots == 0


def test_the_format_of_the_cache_decides():
    options: Any = {"num_pages": 2, "rank": RANK, "rope_dim": ROPE_DIM, "index_dim": INDEX_DIM}
    layout = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
    x, keys, slots = latents(1), latents(1, width=INDEX_DIM), jnp.zeros(1, jnp.int32)
    for scale_format in ("pow2", "fp32"):
        cache = init_cache(
            layout, scale_format=scale_format, index_scale_format=scale_format, **options
        )
        after = append(cache, slots, x, keys)
        after_format: object = jax.tree.structure(after)
        assert after_format == jax.tree.structure(cache)
        assert after.index_keys is not None
        wanted = quantized(x, layout, scale_format=scale_format)
        assert_same_rows(after.rows.gather(slots), wanted)
        assert_same_rows(
            after.index_keys.gather(slots), quantize_index_keys(keys, scale_format=scale_format)
        )


def test_wrong_arguments_say_what_was_expected():
    cache, x = new_cache("bf16"), latents(2)
    slots, keys = jnp.zeros(2, jnp.int32), latents(2, width=INDEX_DIM)
    plain = init_cache(KVLayout.BF16, num_pages=1, rank=RANK, rope_dim=ROPE_DIM)
    for arguments, message in [
        ((cache, slots.astype(jnp.uint32), x, keys), "expected int32"),
        ((cache, slots[None], x, keys), "expected int32"),
        ((cache, slots, x[:1], keys), r"expected \[2, 144\]"),
        ((cache, slots, x[None], keys), r"expected \[2, 144\]"),
        ((cache, slots, x[:, :-1], keys), "last axis of 144"),
        ((cache, slots, x.astype(jnp.float16), keys), "bfloat16 or float32"),
        ((cache, slots, x, None), "keeps an index key"),
        ((cache, slots, x, keys[:1]), "keeps an index key"),
        ((cache, slots, x, keys[:, :-1]), "last axis of 32"),
        ((plain, slots, x, keys), "has no index keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            append(*arguments)
    with pytest.raises(ValueError, match="0 or more pages"):
        init_cache(KVLayout.BF16, num_pages=-1)
    with pytest.raises(ValueError, match="at most 2147483647 slots"):
        init_cache(KVLayout.BF16, num_pages=2**25, page_size=64)
    with pytest.raises(ValueError, match="1 or more tokens"):
        init_cache(KVLayout.BF16, num_pages=1, page_size=0)


def test_vmap_over_layers():
    caches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), new_cache("pow2"))
    x, keys = latents(3, 2), latents(3, 2, width=INDEX_DIM)
    slots = jnp.array([[0, 19], [-1, 3], [20, 7]], jnp.int32)
    after = jax.jit(jax.vmap(append))(caches, slots, x, keys)
    for i in range(3):
        one = jax.jit(append)(new_cache("pow2"), slots[i], x[i], keys[i])
        assert_same_rows(jax.tree.map(lambda leaf, i=i: leaf[i], after), one)


@formats
def test_donated_cache_is_updated_in_place(name):
    # Not 128: XLA's CPU backend copies a leaf whose last axis is 1, a single scale per token.
    cache = new_cache(name, num_pages=512, rank=256)
    x, keys = latents(2, width=256 + ROPE_DIM), latents(2, width=INDEX_DIM)
    write = jax.jit(append, donate_argnames="cache")
    compiled = write.lower(cache, jnp.array([0, 3], jnp.int32), x, keys).compile()
    text = compiled.as_text() or ""
    assert "input_output_alias" in text
    token_leaves = [leaf for leaf in jax.tree.leaves(cache) if leaf.ndim]
    for leaf in token_leaves:
        shapes = (leaf.shape, (cache.num_slots, *leaf.shape[2:]))
        copies = "|".join(re.escape(str(list(shape)).replace(" ", "")) for shape in shapes)
        assert not re.search(rf"= \w+({copies})\S* copy\(", text)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in token_leaves)
    smallest = min(leaf.nbytes for leaf in token_leaves)
    spare = smallest // 2
    if jax.default_backend() == "cpu":
        # This backend views 8-bit floats as bytes by way of a temporary array.
        spare += sum(leaf.nbytes for leaf in token_leaves if leaf.dtype == jnp.float8_e4m3fn)
    assert memory.temp_size_in_bytes <= spare


def test_a_donated_cache_is_gone():
    cache = new_cache("pow2")
    write = jax.jit(append, donate_argnames="cache")
    write(cache, jnp.zeros(1, jnp.int32), latents(1), latents(1, width=INDEX_DIM))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("interleaved", [True, False])
def test_raw_latents_are_normalised_and_rotated_first(interleaved: bool):
    cache = init_cache(KVLayout.BF16, num_pages=4, page_size=4, rank=128)
    slots = np.array([3, -1, 0, 15, 16, 7], np.int32)
    raw = raw_latents(6, rank=128, interleaved=interleaved)
    after = jax.jit(append)(cache, jnp.asarray(slots), raw).rows
    assert isinstance(after, BF16Rows)
    kept = np.array([0, 2, 3, 5])
    assert_prepared(after.flat().latents[slots[kept]], raw, kept)
    assert not np.asarray(after.flat().latents[1]).any()


def test_raw_latents_that_do_not_fit_are_refused():
    cache = init_cache(KVLayout.BF16, num_pages=4, page_size=4, rank=128)
    raw, slots = raw_latents(6, rank=128), jnp.zeros(6, jnp.int32)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"values": raw.values[:5]}, r"latents.shape=\(5, 192\): expected \[6, 192\]"),
        ({"gain": raw.gain[:64]}, r"expected bfloat16 or float32 \[128\]"),
        ({"gain": raw.gain.astype(jnp.float16)}, r"expected bfloat16 or float32 \[128\]"),
        ({"cos": raw.cos[:5]}, r"cos: .*expected float32 \(6, 32\)"),
        ({"sin": raw.sin.astype(jnp.bfloat16)}, r"sin: .*expected float32 \(6, 32\)"),
    ]
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            append(cache, slots, dataclasses.replace(raw, **change))


def test_under_vmap_xla_appends_raw_latents():
    raws = [raw_latents(6, rank=128, seed=seed) for seed in range(2)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *raws)
    cache = init_cache(KVLayout.BF16, num_pages=4, page_size=4, rank=128)
    slots = jnp.arange(6, dtype=jnp.int32)
    run = jax.vmap(functools.partial(append, cache, slots, implementation="mosaic_gpu"))
    rows = jax.jit(run)(both).rows
    assert isinstance(rows, BF16Rows)
    for i, raw in enumerate(raws):
        assert_prepared(rows.latents[i].reshape(16, -1)[:6], raw, np.arange(6))
