"""The kernels that write and convert rows, thread by thread, against XLA on the CPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from jmla import RawLatents
from jmla.cache import Cache, init_cache
from jmla.cache import append as jmla_append
from jmla.layouts import (
    BF16Rows,
    IndexKeyRows,
    KVLayout,
    convert,
    dequantize,
    from_bytes,
    paged_index_keys,
    quantize,
    to_bytes,
    zero_rows,
)
from tests.emulator.cache import rewrite, store
from tests.layouts.bits import assert_same_but_nan, every_kind, without_nan, without_subnormal
from tests.layouts.cases import BLOCK, FORMATS, RAW, leaf_bytes
from tests.layouts.raw import assert_prepared, exact_raw_latents, prepared, raw_latents

# Rows of 448 + 64 hold every layout but block scales, of 512 + 64 all.
RANKS = {name: 448 if name == "v4" else 512 for name in FORMATS}
every_format = pytest.mark.parametrize("name", FORMATS)
DIVIDED = ("fp32", "fp8_scale")
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def hostile(name: str, *, every: int = 7) -> np.ndarray:
    latents = every_kind(RANKS[name] + 64)[::every]
    return without_subnormal(latents) if name in DIVIDED else latents


@functools.partial(jax.jit, static_argnames=("layout", "scale_format"))
def by_xla(x: jax.Array, layout: KVLayout, **options: Any) -> Any:
    return quantize(x, layout, implementation="xla", **options)


def form_of(name: str) -> Any:
    layout, options = FORMATS[name]
    return zero_rows(layout, (0,), rank=RANKS[name], **options)


@every_format
def test_quantize(name: str):
    latents, (layout, options) = hostile(name), FORMATS[name]
    ours = rewrite(latents, form_of(name))
    assert_same_but_nan(ours, by_xla(jnp.asarray(latents), layout, **options))


@pytest.mark.parametrize("name", ["fp32", "fp4"])
def test_quantize_f32(name: str):
    layout, options = FORMATS[name]
    with np.errstate(all="ignore"):
        latents = hostile(name, every=31).astype(np.float32)
        latents = without_subnormal(latents * np.float32(1.0009))
    ours = rewrite(latents, form_of(name))
    assert_same_but_nan(ours, by_xla(jnp.asarray(latents), layout, **options))


@every_format
def test_dequantize_some_slots(name: str):
    layout, options = FORMATS[name]
    rows = by_xla(jnp.asarray(hostile(name)), layout, **options)
    rng = np.random.default_rng(0)
    slots = rng.integers(-4, rows.num_slots + 4, 37).astype(np.int32)
    slots[:3] = [-1, INT_MAX, INT_MIN]
    form = BF16Rows.zeros((0,), rank=rows.rank, rope_dim=64)
    ours = rewrite(rows, form, slots)
    assert_same_but_nan(ours.dequantize(), dequantize(rows.gather(jnp.asarray(slots))))


def test_the_golden_bytes_of_repacking():
    with np.load("tests/data/requantize_raw_to_656.npz") as data:
        raw, packed = data["raw"], data["packed"]
    rows = from_bytes(jnp.asarray(raw), RAW).flat()
    ours = rewrite(rows, zero_rows(BLOCK, (0,)))
    np.testing.assert_array_equal(to_bytes(ours).reshape(packed.shape), packed)


@pytest.mark.parametrize(
    ("before", "after"),
    [("pow2", "fp8"), ("pow2", "fp4"), ("fp4", "fp32"), ("fp32", "pow2"), ("fp8_scale", "fp32")],
)
def test_convert(before: str, after: str):
    (source, given), (layout, options) = FORMATS[before], FORMATS[after]
    rows = by_xla(jnp.asarray(hostile(before, every=41)), source, **given)
    ours = rewrite(rows, form_of(after))
    assert_same_but_nan(ours, convert(rows, layout, implementation="xla", **options))


@pytest.mark.parametrize(
    ("name", "packed"), [*((name, False) for name in FORMATS), ("pow2", True), ("v4", True)]
)
def test_append(name: str, packed: bool):
    layout, options = FORMATS[name]
    rng = np.random.default_rng(1)
    n = 21
    latents, keys = hostile(name)[:n], hostile("fp32")[:n, 64:192]
    cache = init_cache(layout, num_pages=5, page_size=8, index_dim=128, **options)
    if packed:
        latents = without_nan(latents)
        paged = {"page_size": 8} if name == "v4" else options
        rows = from_bytes(to_bytes(cache.rows), layout, in_place=True, **paged)
        assert isinstance(cache.index_keys, IndexKeyRows)
        cache = Cache(rows, paged_index_keys(cache.index_keys.pack(), page_size=8))
        keys = without_nan(keys)
    slots = rng.permutation(40)[:n].astype(np.int32)
    slots[[2, 5, 9]] = [-1, 40, INT_MIN]
    assert cache.index_keys is not None
    after: Any = store([cache.rows, cache.index_keys], slots, [latents, keys])
    expected = jax.jit(functools.partial(jmla_append, implementation="xla"))(
        cache, jnp.asarray(slots), jnp.asarray(latents), jnp.asarray(keys)
    )
    assert_same_but_nan(Cache(*after), expected)


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp32", "fp4", "v4"])
def test_rows_from_another_cache_keep_their_bytes(name: str):
    layout, options = FORMATS[name]
    source, target = (by_xla(jnp.asarray(hostile(name)[i:40]), layout, **options) for i in (0, 9))
    rng = np.random.default_rng(2)
    slots = rng.permutation(31)[:19].astype(np.int32)
    taken = rng.integers(0, 40, 19).astype(np.int32)
    slots[[1, 4]] = [-1, 31]
    (ours,) = store([target], slots, [source], taken)
    for name, before, held in zip(
        target.token_leaves, leaf_bytes(target), leaf_bytes(source), strict=True
    ):
        before = before.copy()
        for slot, origin in zip(slots, taken, strict=True):
            if 0 <= slot < 31:
                before[slot] = held[origin]
        after = np.asarray(getattr(ours, name))
        np.testing.assert_array_equal(after.view(np.uint8), before.reshape(after.shape[0], -1))


def stored_latents(raw: RawLatents, slots: np.ndarray) -> np.ndarray:
    """Of bf16 rows, those at the slots."""
    rows = BF16Rows.zeros((5, 8), rank=raw.rank, rope_dim=64)
    stored: Any = store([rows], slots, [raw])[0]
    return np.asarray(stored.flat().latents)[slots]


@pytest.mark.parametrize("dtype", [bfloat16, np.float32])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rank", [448, 512])
def test_raw_latents_are_normalised_and_rotated(rank: int, interleaved: bool, dtype: Any):
    slots = np.random.default_rng(1).permutation(40)[:13].astype(np.int32)
    raw = raw_latents(13, rank=rank, interleaved=interleaved, dtype=dtype)
    assert_prepared(stored_latents(raw, slots), raw, np.arange(13))
    raw = exact_raw_latents(13, rank=rank, interleaved=interleaved)
    expected = prepared(raw).astype(np.float32).astype(bfloat16)
    np.testing.assert_array_equal(stored_latents(raw, slots), expected)


@every_format
def test_append_of_raw_latents(name: str):
    layout, options = FORMATS[name]
    raw, keys = raw_latents(13, rank=RANKS[name]), hostile("fp32")[:13, 64:192]
    cache = init_cache(layout, num_pages=5, page_size=8, index_dim=128, **options)
    slots = np.random.default_rng(1).permutation(40)[:13].astype(np.int32)
    latents = jnp.asarray(stored_latents(raw, slots))
    slots[[2, 5]] = [-1, 40]
    assert cache.index_keys is not None
    after: Any = store([cache.rows, cache.index_keys], slots, [raw, keys])
    expected = jax.jit(functools.partial(jmla_append, implementation="xla"))(
        cache, jnp.asarray(slots), latents, jnp.asarray(keys)
    )
    assert_same_but_nan(Cache(*after), expected)
