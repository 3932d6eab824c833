"""Moves of whole pages, within a cache or from another one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jmla._checks import check_int32
from jmla._mosaic_cache import (
    CacheImplementation,
    store,
    take,
    takes_kernel,
    unsupported_reasons,
)
from jmla.cache import Cache
from jmla.layouts.base import TokenRows, page_slots


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

    Args:
        cache: what is changed.
        source_pages: int32 `[n]`, pages of `source`.
        target_pages: int32 `[n]`, pages of `cache`. A pair in which either page does not exist is
            dropped, so that padding can be marked by -1. Of duplicates, an unspecified one stays.
        source: a cache of the same format and page size; None is `cache` itself.
        implementation: "mosaic_gpu", kernels for Hopper; "xla"; None is the kernels where JAX's
            default device is a Hopper and they serve the call. The kernels have no derivatives.

    Raises:
        ValueError: pages that are not int32 of one length, or caches of two formats.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
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
    exists = (source_pages >= 0) & (source_pages < origin.num_pages)
    targets = jnp.where(exists, target_pages, -1)
    from_slots = page_slots(source_pages, origin.num_pages, cache.page_size).reshape(-1)
    to_slots = page_slots(targets, cache.num_pages, cache.page_size).reshape(-1)

    held, gaining = _tokens(origin), _tokens(cache)
    kernel = takes_kernel(implementation, lambda: unsupported_reasons(*held, *gaining))
    if kernel and source is not None:
        moved = store(gaining, to_slots, held, source_slots=from_slots, kernel=True)
    else:
        taken = tuple(take(tokens, from_slots, kernel=kernel) for tokens in held)
        moved = store(gaining, to_slots, taken, kernel=kernel)
    return Cache(*moved)


def _tokens(cache: Cache) -> tuple[TokenRows, ...]:
    return (cache.rows,) if cache.index_keys is None else (cache.rows, cache.index_keys)
