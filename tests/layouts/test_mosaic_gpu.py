"""The kernels that write and convert rows, on a Hopper, byte by byte against XLA on the CPU."""

import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jmla.cache import Cache, append, init_cache
from jmla.layouts import (
    FP8Rows,
    IndexKeyRows,
    KVLayout,
    Rows,
    convert,
    dequantize,
    from_bytes,
    paged_index_keys,
    quantize,
    to_bytes,
)
from jmla.pages import move_pages
from tests.helpers import golden
from tests.layouts.bits import (
    assert_same_but_nan,
    every_kind,
    exactly_dequantised,
    on_cpu,
    without_nan,
    without_subnormal,
)
from tests.layouts.cases import BLOCK, FORMATS, RAW
from tests.layouts.raw import assert_prepared, exact_raw_latents, prepared, raw_latents

pytestmark = pytest.mark.usefixtures("hopper")

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
# XLA on the CPU may divide subnormal numbers as zeros.
DIVIDED = ("fp32", "fp8_scale")
every_format = pytest.mark.parametrize("name", FORMATS)


def width_of(name: str) -> int:
    return 512 if name == "v4" else 576


def copied(tree: Any) -> Any:
    """Other arrays of the same values."""
    return jax.tree.map(jnp.copy, tree)


def kernel(function: Any, **options: Any) -> Any:
    return functools.partial(function, implementation="mosaic_gpu", **options)


def by_xla(function: Any, *arguments: Any, **options: Any) -> Any:
    """On the CPU; XLA on a GPU may contract what it fuses."""
    run = jax.jit(functools.partial(function, implementation="xla", **options))
    return run(*(on_cpu(each) for each in arguments))


def hostile(name: str) -> np.ndarray:
    """Adversarial latents, of which XLA on the CPU makes what it should."""
    latents = every_kind(width_of(name))
    return without_subnormal(latents) if name in DIVIDED else latents


@functools.cache
def hostile_rows(name: str, *, subnormal: bool = True) -> Rows:
    """Adversarial rows, of every code, made on the CPU."""
    layout, options = FORMATS[name]
    latents = hostile(name) if subnormal else without_subnormal(hostile(name))
    return by_xla(quantize, jnp.asarray(latents), layout=layout, **options)


@every_format
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_quantize(name: str, dtype: Any):
    layout, options = FORMATS[name]
    latents = hostile(name)
    if dtype == jnp.float32:
        rng = np.random.default_rng(5)
        wide = latents.astype(np.float32)
        # XLA on the CPU may flush what is subnormal.
        normal = np.abs(wide) >= 2.0**-100
        with np.errstate(all="ignore"):
            latents = np.where(normal, wide * rng.uniform(0.998, 1.002, wide.shape), 0)
    given = jnp.asarray(latents, dtype)
    ours = kernel(quantize, layout=layout, **options)(given)
    assert_same_but_nan(ours, by_xla(quantize, given, layout=layout, **options))


@pytest.mark.parametrize(
    "scale",
    [1e-45, 3e-39, 2.0**-126, 1.1e-30, 0.01, 1.0, 448.0, 7e11, 2.0**126, 3e38, -0.7, 0.0, np.inf],
)
def test_scales_of_a_tensor(scale: float):
    latents = jnp.asarray(every_kind(576))
    ours = quantize(latents, RAW, scale=scale, implementation="mosaic_gpu")
    assert isinstance(ours, FP8Rows) and ours.scale is not None
    x = np.asarray(latents).astype(np.float32)
    with np.errstate(all="ignore"):
        quotient = x / np.float32(scale)
    codes = np.clip(quotient, -448, 448).astype(jnp.float8_e4m3fn)
    assert_same_but_nan(ours.values, jnp.asarray(codes))
    assert float(ours.scale) == np.float32(scale)


def test_quotients_next_to_the_middle_of_two_codes():
    """Scales of which some value is the middle of two codes but for a few units."""
    middles = np.array([1, 3, 7, 15, 17, 21, 27, 31], np.float32) * np.float32(2.0**-10)
    values = np.array([1, 1.0078125, 1.3359375, 1.6640625, 1.9921875], np.float32)
    near = (values[:, None] / middles).ravel().view(np.int32)[:, None] + np.arange(-2, 3)
    scales = np.append(near.ravel().astype(np.int32).view(np.float32), np.float32(2 - 2.0**-23))
    x = np.resize(values, (64, 576)) * np.ldexp(np.float32(1), np.arange(64) % 9 - 4)[:, None]
    latents = jnp.asarray(x, jnp.bfloat16)
    run = jax.jit(lambda x, scale: kernel(quantize, layout=RAW, scale=scale)(x).values)
    for scale in scales:
        codes = np.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn)
        assert_same_but_nan(run(latents, scale), jnp.asarray(codes))


@every_format
def test_dequantize(name: str):
    rows = hostile_rows(name)
    ours = kernel(dequantize)(jax.device_put(rows, jax.devices()[0]))
    assert_same_but_nan(ours, exactly_dequantised(rows))


@pytest.mark.parametrize("name", ["fp4", "v4", "pow2", "fp8_scale"])
def test_every_stored_byte_is_read(name: str):
    """Against numpy: XLA on the CPU may flush what scales of every exponent make."""
    rng = np.random.default_rng(4)
    layout, options = FORMATS[name]
    page = {"page_size": 8} if name == "v4" else {}
    size = layout.bytes_per_token() * (8 if page else 1)
    packed = jnp.asarray(rng.integers(0, 256, (512, size), np.uint8))
    rows = from_bytes(packed, layout, **(page or options))
    assert_same_but_nan(kernel(dequantize)(rows), exactly_dequantised(rows))


PAIRS = [
    (a, b)
    for a in FORMATS
    for b in FORMATS
    if a != b and "v4" not in (a, b) and (a, b) != ("fp8_scale", "pow2")
]
# Codes that are not computed: powers of two are f32 scales, and so is a tensor's, which stays if no
# other is given.
KEPT = {
    ("pow2", "fp32"),
    ("fp8", "pow2"),
    ("fp8", "fp32"),
    ("fp8_scale", "fp32"),
    ("fp8_scale", "fp8"),
}


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_convert(before: str, after: str):
    layout, options = FORMATS[after]
    rows = hostile_rows(before, subnormal=after not in DIVIDED)
    here = jax.device_put(rows, jax.devices()[0])
    ours = convert(here, layout, implementation="mosaic_gpu", **options)
    if (before, after) in KEPT:
        theirs = by_xla(convert, rows, layout=layout, **options)
    else:
        values = jnp.asarray(exactly_dequantised(rows))
        theirs = by_xla(quantize, values, layout=layout, **options)
    assert_same_but_nan(ours, theirs)


@every_format
@pytest.mark.parametrize("n", [1, 3, 130])
def test_slots_that_are_none_give_zeros(name: str, n: int):
    rng = np.random.default_rng(n)
    rows = hostile_rows(name)
    here = jax.device_put(rows, jax.devices()[0])
    slots = rng.integers(-3, rows.num_slots + 3, (n, 3)).astype(np.int32)
    slots[0] = [-1, INT_MIN, INT_MAX]
    slots = jnp.asarray(slots)
    taken = by_xla(lambda rows, slots, **_: rows.gather(slots), rows, slots)
    assert_same_but_nan(kernel(dequantize)(here, slots=slots), exactly_dequantised(taken))
    assert_same_but_nan(kernel(convert)(here, here.layout, slots=slots), taken)


def cache_of(name: str, *, pages: int, page_size: int, packed: bool, index_format: Any) -> Cache:
    layout, options = FORMATS[name]
    cache = init_cache(
        layout,
        num_pages=pages,
        page_size=page_size,
        index_dim=128 if index_format else None,
        index_scale_format=index_format or "fp32",
        **options,
    )
    if packed:
        paged = {"page_size": page_size} if name == "v4" else options
        rows = from_bytes(to_bytes(cache.rows), layout, in_place=True, **paged)
        keys = cache.index_keys
        if isinstance(keys, IndexKeyRows):
            keys = paged_index_keys(
                keys.pack(), page_size=page_size, scale_format=keys.scale_format
            )
        cache = Cache(rows, keys)
    return cache


APPENDS = [
    *((name, False, form, 333) for name in FORMATS for form in (None, "fp32")),
    *((name, True, "pow2", 333) for name in ("pow2", "fp32", "v4")),
    *(("pow2", packed, "fp32", n) for packed in (False, True) for n in (1, 7, 2049)),
    *((name, False, None, 2503) for name in FORMATS),
]


@pytest.mark.parametrize(("name", "packed", "index_format", "n"), APPENDS)
def test_append(name: str, packed: bool, index_format: Any, n: int):
    rng = np.random.default_rng(n)
    cache = cache_of(name, pages=200, page_size=16, packed=packed, index_format=index_format)
    all_latents = without_nan(hostile(name)) if packed else hostile(name)
    all_keys = without_subnormal(all_latents[:, 128:256])
    kernel_append = jax.jit(kernel(append), donate_argnums=0)
    expected = on_cpu(cache)
    for _ in range(2):
        slots = rng.permutation(3200)[:n].astype(np.int32)
        slots[rng.random(n) < 0.1] = rng.choice([-1, INT_MIN, INT_MAX, 3200])
        latents = jnp.asarray(rng.choice(all_latents, n))
        keys = jnp.asarray(rng.choice(all_keys, n))
        given = (jnp.asarray(slots), latents, keys if index_format else None)
        cache = kernel_append(cache, *given)
        expected = by_xla(append, expected, *given)
    assert_same_but_nan(cache, expected)


def test_append_under_vmap_and_in_a_loop():
    caches = jax.vmap(
        lambda _: cache_of("pow2", pages=2, page_size=8, packed=False, index_format="fp32")
    )(jnp.arange(3))
    latents = jnp.asarray(every_kind(576)[:15].reshape(3, 5, 576))
    keys, slots = latents[..., :128], jnp.arange(15, dtype=jnp.int32).reshape(3, 5)
    ours = jax.jit(jax.vmap(kernel(append)))(caches, slots, latents, keys)
    theirs = by_xla(
        lambda *a, **o: jax.vmap(functools.partial(append, **o))(*a), caches, slots, latents, keys
    )
    assert_same_but_nan(ours, theirs)
    one = jax.tree.map(lambda leaf: leaf[0], caches)

    def step(cache: Any, new: Any) -> tuple[Any, None]:
        return append(cache, *new, implementation="mosaic_gpu"), None

    looped, _ = jax.jit(lambda *a: jax.lax.scan(step, *a))(one, (slots, latents, keys))
    expected = on_cpu(one)
    for i in range(3):
        expected = by_xla(append, expected, slots[i], latents[i], keys[i])
    assert_same_but_nan(looped, expected)


def test_repacking_matches_the_golden_bytes():
    data = golden("requantize_raw_to_656")
    rows = from_bytes(jnp.asarray(data["raw"]), RAW)
    packed = to_bytes(kernel(convert)(rows, BLOCK))
    np.testing.assert_array_equal(packed, data["packed"])


@pytest.mark.parametrize(
    ("name", "packed"), [*((n, False) for n in FORMATS), ("pow2", True), ("v4", True)]
)
def test_pages_move_as_they_are(name: str, packed: bool):
    def filled(seed: int):
        cache = cache_of(name, pages=12, page_size=16, packed=packed, index_format="fp32")
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.choice(without_nan(hostile(name)), 192))
        slots = jnp.arange(192, dtype=jnp.int32)
        return jax.jit(kernel(append))(cache, slots, x, x[:, :128])

    cache, other = filled(0), filled(1)
    pages = np.array([[0, 1], [1, 2], [2, 0], [5, 9], [-1, 3], [4, 12], [INT_MAX, 6], [7, INT_MIN]])
    source, target = jnp.asarray(pages.T, jnp.int32)
    for given in ({}, {"source": other}):
        ours = jax.jit(kernel(move_pages))(cache, source, target, **given)
        theirs = jax.jit(functools.partial(move_pages, implementation="xla"))
        assert_same_but_nan(ours, theirs(cache, source, target, **given))
    if not packed:
        table = jnp.asarray([[3, -1], [12, 11]], jnp.int32)
        taken = kernel(dequantize)(cache.rows, pages=table)
        assert_same_but_nan(taken, dequantize(cache.rows, pages=table, implementation="xla"))
        assert not np.asarray(taken[0, 1]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rank", [448, 512])
def test_raw_latents_are_normalised_and_rotated(rank: int, interleaved: bool, dtype: Any):
    """In rows of bf16, that keep what the kernel makes of them."""
    cache = init_cache(KVLayout.BF16, num_pages=200, page_size=16, rank=rank)
    slots = jnp.asarray(np.random.default_rng(1).permutation(3200)[:2503], jnp.int32)
    raw = raw_latents(2503, rank=rank, interleaved=interleaved, dtype=dtype)
    stored = kernel(append)(cache, slots, raw).rows.flat().gather(slots).latents
    assert_prepared(stored, raw, np.arange(2503))
    raw = exact_raw_latents(2503, rank=rank, interleaved=interleaved)
    stored = kernel(append)(cache, slots, raw).rows.flat().gather(slots).latents
    expected = prepared(raw).astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("packed", [False, True])
@every_format
def test_append_of_raw_latents_is_that_of_their_bf16(name: str, packed: bool):
    if packed and name not in ("pow2", "v4"):
        pytest.skip("no other layout has rows that stay packed")
    rank = width_of(name) - 64
    plain = init_cache(KVLayout.BF16, num_pages=30, page_size=16, rank=rank)
    cache = cache_of(name, pages=30, page_size=16, packed=packed, index_format="fp32")
    slots = np.random.default_rng(2).permutation(480)[:333].astype(np.int32)
    raw = raw_latents(333, rank=rank)
    keys = jnp.asarray(np.random.default_rng(3).standard_normal((333, 128)), jnp.bfloat16)
    stored = kernel(append)(plain, jnp.asarray(slots), raw).rows
    latents = stored.flat().gather(jnp.asarray(slots)).latents
    slots[[1, 5, 300]] = [-1, 480, INT_MIN]
    given = jnp.asarray(slots)
    fused = jax.jit(kernel(append), donate_argnums=0)(copied(cache), given, raw, keys)
    assert_same_but_nan(fused, kernel(append)(cache, given, latents, keys))


def test_pages_of_host_memory_move_in_place():
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    cache = cache_of("pow2", pages=64, page_size=64, packed=False, index_format="fp32")
    there = jax.tree.map(lambda _: host, cache)
    outside = jax.device_put(cache, there)
    pages = jnp.arange(3, dtype=jnp.int32), jnp.arange(3, dtype=jnp.int32)

    def moved(cache: Cache, source: Cache, *pages: jax.Array) -> Cache:
        return move_pages(cache, *pages, source=source, implementation="mosaic_gpu")

    for target, source, where in ((outside, cache, there), (cache, outside, None)):
        run = jax.jit(moved, donate_argnums=0, out_shardings=where)
        compiled = run.lower(target, source, *pages).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
        assert aliased >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        assert memory.temp_size_in_bytes + memory.host_temp_size_in_bytes < 1 << 12
        assert not re.search(r"\bcopy(-start)?\(", compiled.as_text() or "")


def test_pages_of_host_memory_move_in_a_loop():
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    cache = cache_of("pow2", pages=8, page_size=64, packed=False, index_format="fp32")
    outside = jax.device_put(cache, jax.tree.map(lambda _: host, cache))

    @functools.partial(jax.jit, donate_argnums=0)
    def shifted(cache: Cache) -> Cache:
        def step(cache: Cache, page: jax.Array) -> tuple[Cache, None]:
            return move_pages(cache, page[None], page[None] + 1, implementation="mosaic_gpu"), None

        return jax.lax.scan(step, cache, jnp.arange(7, dtype=jnp.int32))[0]

    moved = shifted(outside)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moved)} == {"pinned_host"}
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[:1].repeat(8, axis=0), cache)
    for ours, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(
            np.asarray(ours).view(np.uint8), np.asarray(wanted).view(np.uint8)
        )


@hypothesis.given(
    name=st.sampled_from(list(FORMATS)),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    spread=st.integers(0, 60),
    any_bits=st.booleans(),
)
def test_any_latents(name: str, n: int, seed: int, spread: int, any_bits: bool):
    rng = np.random.default_rng(seed)
    shape = (40, width_of(name))
    if any_bits:
        values = rng.integers(0, 1 << 16, shape).astype(np.uint16).view(jnp.bfloat16)
        values = np.where(rng.random(shape) < rng.random(), values, 0).astype(jnp.bfloat16)
        values = without_subnormal(values) if name in DIVIDED else values
    else:
        values = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
    latents = jnp.asarray(values, jnp.bfloat16)
    slots = rng.permutation(64)[:40].astype(np.int32)
    slots[n:] = -1
    cache = cache_of(name, pages=8, page_size=8, packed=False, index_format=None)
    ours = _append_kernel(cache, jnp.asarray(slots), latents)
    assert_same_but_nan(
        ours, _append_xla(on_cpu(cache), on_cpu(jnp.asarray(slots)), on_cpu(latents))
    )


_append_kernel = jax.jit(kernel(append))
_append_xla = jax.jit(functools.partial(append, implementation="xla"))
