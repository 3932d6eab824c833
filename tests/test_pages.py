"""Pages moved and converted, against numpy on their bytes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jmla.cache import Cache, append, init_cache
from jmla.layouts import KVLayout, convert, dequantize, from_bytes, to_bytes
from jmla.pages import move_pages
from tests.layouts.cases import (
    BLOCK,
    FORMATS,
    RANK,
    ROPE_DIM,
    assert_same_rows,
    latents,
    leaf_bytes,
    small_rows,
)

PAGES, SIZE = 6, 4
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


@functools.cache
def filled(name: str, *, seed: int = 0, pages: int = PAGES, packed: bool = False) -> Cache:
    layout, options = FORMATS[name]
    sizes: dict[str, Any] = {"rank": RANK, "rope_dim": ROPE_DIM}
    cache = init_cache(layout, num_pages=pages, page_size=SIZE, index_dim=32, **sizes, **options)
    n = pages * SIZE
    keys = latents(n, seed=seed + 5, width=32)
    cache = jax.jit(append)(cache, jnp.arange(n, dtype=jnp.int32), latents(n, seed=seed), keys)
    if packed:
        paged = {"page_size": SIZE} if name == "v4" else options
        rows = from_bytes(to_bytes(cache.rows), layout, in_place=True, **sizes, **paged)
        return Cache(rows, cache.index_keys)
    return cache


def moved(cache: Cache, source: Cache, pairs: list[tuple[int, int]]) -> list[np.ndarray]:
    """The bytes of each leaf by page, after the moves of `pairs`."""
    result = []
    for ours, theirs in zip(leaf_bytes(cache), leaf_bytes(source), strict=True):
        after = ours.copy()
        for a, b in pairs:
            if ours.ndim > 1 and 0 <= a < source.num_pages and 0 <= b < cache.num_pages:
                after[b] = theirs[a]
        result.append(after)
    return result


def assert_moved(after: Cache, expected: list[np.ndarray]) -> None:
    for ours, theirs in zip(leaf_bytes(after), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


KINDS = [*((name, False) for name in FORMATS), ("pow2", True), ("v4", True)]


@pytest.mark.parametrize(("name", "packed"), KINDS)
def test_moves_within_a_cache_read_before_they_write(name: str, packed: bool):
    cache = filled(name, packed=packed)
    # A cycle, a chain, and pairs of which one page does not exist.
    pairs = [(0, 1), (1, 2), (2, 0), (3, 4), (-1, 5), (INT_MAX, 5), (4, PAGES), (5, INT_MIN)]
    given = np.array(pairs, np.int32).T
    after = jax.jit(move_pages)(cache, *map(jnp.asarray, given))
    assert_moved(after, moved(cache, cache, pairs))


@pytest.mark.parametrize(("name", "packed"), KINDS[::3])
def test_moves_from_another_cache(name: str, packed: bool):
    cache, source = filled(name, packed=packed), filled(name, seed=1, pages=3, packed=packed)
    pairs = [(2, 0), (0, 5), (0, 3), (3, 1), (-1, 2)]
    given = np.array(pairs, np.int32).T
    after = move_pages(cache, *map(jnp.asarray, given), source=source)
    assert_moved(after, moved(cache, source, pairs))


@pytest.mark.parametrize(("name", "packed"), KINDS)
def test_moves_to_and_from_host_memory(name: str, packed: bool):
    device = jax.devices()[0]
    host = SingleDeviceSharding(device, memory_kind="pinned_host")
    cache, other = filled(name, packed=packed), filled(name, seed=1, pages=3, packed=packed)

    def out(cache: Cache, source: Cache, *pages: jax.Array) -> Cache:
        return move_pages(cache, *pages, source=source)

    # Of host memory are what has pages, not the scale of a tensor.
    outside = jax.tree.map(lambda x: jax.device_put(x, host) if x.ndim else jnp.copy(x), other)
    there = jax.tree.map(lambda leaf: host if leaf.ndim else None, other)
    pairs = [(0, 2), (5, 0), (-1, 1), (6, 1), (1, 3)]
    pages = tuple(map(jnp.asarray, np.array(pairs, np.int32).T))
    outside = jax.jit(out, donate_argnums=0, out_shardings=there)(outside, cache, *pages)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(outside) if leaf.ndim}
    assert kinds == {"pinned_host"}
    expected = moved(other, cache, pairs)
    assert_moved(outside, expected)

    pairs = [(2, 1), (0, 4), (1, 3), (3, 0), (-1, 2)]
    pages = tuple(map(jnp.asarray, np.array(pairs, np.int32).T))
    after = jax.jit(out)(cache, outside, *pages)
    assert_moved(after, moved(cache, outside, pairs))


def test_wrong_caches_and_pages_are_refused():
    cache, one = filled("pow2"), jnp.zeros(1, jnp.int32)
    refused: list[tuple[Any, Any, str]] = [
        ((one.astype(jnp.uint32), one), {}, "source_pages: got uint32"),
        ((one, jnp.zeros(2, jnp.int32)), {}, "target_pages: got"),
        ((one[None], one[None]), {}, "source_pages: got"),
        ((one, one), {"source": filled("fp32")}, "expected the format of the cache"),
        ((one, one), {"source": Cache(cache.rows)}, "expected the format of the cache"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            move_pages(cache, *arguments, **options)


@pytest.mark.parametrize("name", ["fp8_scale", "pow2"])
def test_pages_of_a_page_table(name: str):
    rows = small_rows(name, 5, SIZE)
    table = np.array([[4, 0, -1], [2, 5, INT_MAX]], np.int32)
    slots = np.where(
        ((table >= 0) & (table < 5))[..., None], table[..., None] % 5 * SIZE + np.arange(SIZE), -1
    )
    pages, chosen = jnp.asarray(table), jnp.asarray(slots, jnp.int32)
    for function in (dequantize, functools.partial(_to_fp32)):
        ours, theirs = function(rows, pages=pages), function(rows, slots=chosen)
        assert_same_rows(ours, theirs)
    with pytest.raises(ValueError, match=r"token shape \(pages, page_size\)"):
        dequantize(rows.flat(), pages=pages)
    with pytest.raises(ValueError, match="no slots beside"):
        convert(rows, KVLayout.BF16, pages=pages, slots=chosen)


def _to_fp32(rows: Any, **chosen: Any) -> Any:
    return convert(rows, BLOCK, scale_format="fp32", **chosen)


def test_the_slots_of_dequantize():
    rows = small_rows("pow2", 3, SIZE)
    slots = jnp.array([[0, 11, -1], [12, INT_MIN, 7]], jnp.int32)
    ours = dequantize(rows, slots=slots)
    np.testing.assert_array_equal(ours, dequantize(rows.gather(slots)))


@pytest.mark.parametrize("name", ["pow2", "fp4"])
def test_a_named_kernel_says_what_it_cannot_serve(name: str):
    layout, options = FORMATS[name]
    x = latents(3)
    with pytest.raises(ValueError, match="expected 'mosaic_gpu', 'xla'"):
        dequantize(small_rows(name, 3), implementation="triton")  # type: ignore[arg-type]
    empty = init_cache(layout, num_pages=0, rank=RANK, rope_dim=ROPE_DIM, **options)
    with pytest.raises(NotImplementedError, match="at least one slot"):
        append(empty, jnp.zeros(3, jnp.int32), x, implementation="mosaic_gpu")
    cache = init_cache(layout, num_pages=1, rank=RANK, rope_dim=ROPE_DIM, index_dim=24, **options)
    keys = latents(3, width=24)
    with pytest.raises(NotImplementedError, match=r"each.dim=24"):
        append(cache, jnp.zeros(3, jnp.int32), x, keys, implementation="mosaic_gpu")
    packed = to_bytes(small_rows("pow2", 3))
    rows = from_bytes(packed, BLOCK, rank=RANK, rope_dim=ROPE_DIM, in_place=True)
    with pytest.raises(NotImplementedError, match="multiples of"):
        dequantize(rows, implementation="mosaic_gpu")


def test_under_vmap_xla_does_the_kernels_work():
    caches = jax.tree.map(lambda *x: jnp.stack(x), filled("pow2"), filled("pow2", seed=1))
    pages = jnp.array([[[0, 1], [3, 4]], [[5, 2], [-1, 0]]], jnp.int32)
    for source in (None, caches):

        def move(cache: Cache, source: Cache | None, pages: jax.Array) -> Cache:
            return move_pages(cache, *pages, source=source, implementation="mosaic_gpu")

        ours = jax.jit(jax.vmap(move))(caches, source, pages)
        for i in range(2):
            cache = jax.tree.map(lambda x, i=i: x[i], caches)
            expected = moved(cache, cache, list(zip(*np.asarray(pages[i]), strict=True)))
            assert_moved(jax.tree.map(lambda x, i=i: x[i], ours), expected)
