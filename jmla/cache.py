"""The paged cache of one layer: latent rows, and the index keys by which tokens are chosen."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmla._mosaic_cache import (
    CacheImplementation,
    store,
    takes_kernel,
    unsupported_reasons,
)
from jmla.layouts.base import KVLayout, Rows, ScaleFormat, TokenRows, check_latents
from jmla.layouts.bf16_index_keys import BF16IndexKeyRows
from jmla.layouts.codec import zero_rows
from jmla.layouts.index_keys import IndexKeyRows
from jmla.layouts.paged_index_keys import PagedIndexKeyRows
from jmla.raw_latents import RawLatents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Pages of rows; a token's slot is `page * page_size + offset`.

    Attributes:
        rows: latent rows of token shape `(num_pages, page_size)`.
        index_keys: index keys of the same token shape, packed or not; None for a layer without.
    """

    rows: Rows
    index_keys: IndexKeyRows | PagedIndexKeyRows | BF16IndexKeyRows | None = None

    @property
    def layout(self) -> KVLayout:
        """How a latent row is stored."""
        return self.rows.layout

    @property
    def num_pages(self) -> int:
        """The number of pages."""
        return self.rows.shape[0]

    @property
    def page_size(self) -> int:
        """The number of tokens in a page."""
        return self.rows.shape[1]

    @property
    def num_slots(self) -> int:
        """The number of tokens the cache can hold."""
        return self.rows.num_slots

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one latent row and its index key."""
        index_bytes = 0 if self.index_keys is None else self.index_keys.bytes_per_token
        return self.rows.bytes_per_token + index_bytes


def init_cache(
    layout: KVLayout,
    *,
    num_pages: int,
    page_size: int = 64,
    rank: int | None = None,
    rope_dim: int = 64,
    scale_format: ScaleFormat = "pow2",
    index_dim: int | None = None,
    index_scale_format: ScaleFormat = "fp32",
    index_hadamard: bool = False,
    index_bf16: bool = False,
    scale: Array | float | None = None,
) -> Cache:
    """A cache of zeros.

    Args:
        layout: how a latent row is stored.
        num_pages: number of pages, 0 or more.
        page_size: tokens in a page.
        rank: number of no-position values; None takes the layout's default (448 for FP8_V4, else
            512).
        rope_dim: number of rotary values.
        scale_format: which scales a block may have; only the block-scale layout looks at it.
        index_dim: length of an index key; None makes a cache without index keys.
        index_scale_format: which scales an index key may have.
        index_hadamard: whether index keys are rotated by `jmla.hadamard_rotation` before `append`.
        index_bf16: whether index keys are kept in bf16, as they are, and not in e4m3.
        scale: the scale of the whole tensor, for FP8_NOPE_FP8_ROPE alone; None is exactly 1.

    Raises:
        ValueError: a size is out of range, or the layout is not defined for the rank.
    """
    if num_pages < 0 or page_size < 1:
        raise ValueError(f"{num_pages=} {page_size=}: expected 0 or more pages of 1 or more tokens")
    if num_pages * page_size > jnp.iinfo(jnp.int32).max:
        raise ValueError(
            f"{num_pages=} {page_size=}: expected at most {jnp.iinfo(jnp.int32).max} slots, which "
            "are int32; use several caches"
        )
    shape = (num_pages, page_size)
    rows = zero_rows(
        layout, shape, rank=rank, rope_dim=rope_dim, scale_format=scale_format, scale=scale
    )
    if index_dim is None:
        return Cache(rows)
    if index_bf16:
        if index_hadamard:
            raise ValueError(f"{index_bf16=} {index_hadamard=}: expected at most one of these")
        return Cache(rows, BF16IndexKeyRows.zeros(shape, dim=index_dim))
    index_keys = IndexKeyRows.zeros(
        shape, dim=index_dim, scale_format=index_scale_format, hadamard=index_hadamard
    )
    return Cache(rows, index_keys)


def append(
    cache: Cache,
    slots: Int[Array, " n"],
    latents: Float[Array, "n width"] | RawLatents,
    index_keys: Float[Array, "n dim"] | None = None,
    *,
    implementation: CacheImplementation | None = None,
) -> Cache:
    """The cache with new tokens stored, quantised to the cache's own format.

    Donate the cache (`jax.jit(..., donate_argnames="cache")`) to update it in place.

    Args:
        cache: the cache before.
        slots: int32 `[n]`. A slot outside `[0, num_slots)` is dropped, so that padding can be
            marked by -1. Of duplicates, an unspecified one stays.
        latents: bf16 or f32 `[n, width]`; or `RawLatents`, which are normalised and rotated first,
            in f32, and rounded once to the dtype of their values. The kernel sums squares in an
            order of its own: of bf16 values one in some hundreds may round to the other neighbour.
        index_keys: bf16 or f32 `[n, dim]`; required if the cache has index keys, else None.
        implementation: "mosaic_gpu", one kernel for Hopper that writes into the cache; "xla"; None
            is the kernel where JAX's default device is a Hopper and the kernel serves the call.
            Both store the same bytes of the same latents, but for the sign of NaN. The kernel has
            no derivatives.

    Raises:
        ValueError: a wrong shape or dtype, or index keys given or left out against the cache.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    cache.rows.check()
    if slots.ndim != 1 or slots.dtype != jnp.int32:
        raise ValueError(f"{slots.shape=} {slots.dtype=}: expected int32 [n], a slot per token")
    if latents.shape[:-1] != slots.shape:
        raise ValueError(f"{latents.shape=}: expected [{slots.shape[0]}, {cache.rows.width}]")
    if isinstance(latents, RawLatents):
        latents.check(cache.rows.rank, cache.rows.rope_dim)
    else:
        check_latents(latents, cache.rows.width)
    if cache.index_keys is None:
        if index_keys is not None:
            raise ValueError(
                f"{index_keys.shape=}: expected None, the cache has no index keys; pass index_dim "
                "to init_cache"
            )
    else:
        cache.index_keys.check()
        if index_keys is None or index_keys.shape[:-1] != slots.shape:
            got = "None" if index_keys is None else f"{index_keys.shape}"
            raise ValueError(
                f"index_keys: got {got}, expected [{slots.shape[0]}, {cache.index_keys.dim}]: the "
                "cache keeps an index key for each token"
            )
        check_latents(index_keys, cache.index_keys.dim)
    targets: tuple[TokenRows, ...] = (cache.rows,)
    sources: tuple[Float[Array, "n width"] | RawLatents, ...] = (latents,)
    if cache.index_keys is not None and index_keys is not None:
        targets, sources = (cache.rows, cache.index_keys), (latents, index_keys)
    kernel = takes_kernel(implementation, lambda: unsupported_reasons(*targets, *sources))
    return Cache(*store(targets, slots, sources, kernel=kernel))
