"""Moves of whole pages: within a cache, from another one, and to and from host memory."""

import jax
from jaxtyping import Array, Int

from jmla._checks import check_int32
from jmla._mosaic_cache import CacheImplementation, takes_kernel
from jmla._mosaic_pages import Tokens, move
from jmla.cache import Cache


def move_pages(
    cache: Cache,
    source_pages: Int[Array, " n"],
    target_pages: Int[Array, " n"],
    *,
    source: Cache | None = None,
    implementation: CacheImplementation | None = None,
) -> Cache:
    """The cache with the bytes of other pages in some of its own, of latents and of index keys.

    The scale of a whole tensor is no part of a page: both caches should have the same.

    Every target page gets what its source page held before the call, whatever the two lists have
    in common: a permutation is a permutation. Pages within one cache therefore go by way of a
    buffer of their size; from another cache they are copied once. Donate the cache
    (`jax.jit(..., donate_argnames="cache")`) to update it in place.

    The arrays of either cache may be in host memory (memory kind "pinned_host"): pages move out
    into such a cache, and come back with it as `source`. No other page crosses the link.

    Args:
        cache: what is changed.
        source_pages: int32 `[n]`, pages of `source`.
        target_pages: int32 `[n]`, pages of `cache`. A pair in which either page does not exist is
            dropped, so that padding can be marked by -1. Of duplicates, an unspecified one stays.
        source: a cache of the same format and page size; None is `cache` itself.
        implementation: "mosaic_gpu", kernels for Hopper; "xla"; None is the kernels where JAX's
            default device is a Hopper. The kernels have no derivatives.

    Raises:
        ValueError: pages that are not int32 of one length, or caches of two formats.
    """
    check_int32("source_pages", source_pages, source_pages.shape[:1])
    check_int32("target_pages", target_pages, source_pages.shape)
    origin = cache if source is None else source
    ours: object = jax.tree.structure(cache)
    theirs: object = jax.tree.structure(origin)
    if ours != theirs or origin.page_size != cache.page_size:
        raise ValueError(
            f"source is {theirs} in pages of {origin.page_size}: expected the format of the cache, "
            f"{ours} in pages of {cache.page_size}; use jmla.convert for another format"
        )
    strides = [
        [leaf.shape[1:] for leaf in jax.tree.leaves(each) if leaf.ndim] for each in (cache, origin)
    ]
    if strides[0] != strides[1]:
        raise ValueError(f"pages of {strides[1]}: expected those of the cache, {strides[0]}")
    held = None if source is None else _tokens(source)
    kernel = takes_kernel(implementation, lambda: [])
    return Cache(*move(_tokens(cache), held, source_pages, target_pages, kernel=kernel))


def _tokens(cache: Cache) -> Tokens:
    return (cache.rows,) if cache.index_keys is None else (cache.rows, cache.index_keys)
