"""The lightning indexer: how relevant each stored token is to each query, from small fp8 keys.

    logit[t, s] = key_scale[s] * sum over heads of weights[t, h] * relu(q[t, h] . key[s])

`indexer_logits` scores keys that lie back to back, each query inside its own window of them;
`paged_indexer_logits` scores the pages of a cache. `jmla.topk.select_topk` picks from either.

`implementation`:

- `"xla"` runs everywhere: products are exact, sums f32.
- `"mosaic_gpu"` is a kernel for Hopper (compute capability 9.0) for queries and keys both in e4m3
  or both in bf16, 1 to 64 heads of 64 or 128 values, and pages of any size at multiples of 16
  bytes. Its tensor cores add a head's products of e4m3 with fewer bits than f32 has, as they do in
  every FP8 product of that GPU. It
  holds nothing beside its result, but for `PagedIndexKeyRows` that stand alone, which it unpacks
  first. It has no derivative. A call that it does not serve raises NotImplementedError with every
  reason. Any machine can trace and lower it, to compile it ahead of time.
- None is `"mosaic_gpu"` where JAX's default device is a GPU of compute capability 9.0 and the
  kernel serves the call, and `"xla"` otherwise.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jmla import _mosaic_logits
from jmla._checks import check_int32
from jmla._implementation import choose
from jmla.layouts.bf16_index_keys import BF16IndexKeyRows
from jmla.layouts.index_keys import IndexKeyRows
from jmla.layouts.paged_index_keys import PagedIndexKeyRows
from jmla.topk import paged_indices

_BLOCK_KEYS = 4096
# Most elements of one block of per-head products, q . key of [tokens, heads, keys].
_CPU_BLOCK_PRODUCTS = 1 << 20
_BLOCK_PRODUCTS = 1 << 26

_Keys = IndexKeyRows | PagedIndexKeyRows | BF16IndexKeyRows
_OTHERS = ("xla",)


def indexer_logits(
    q: Float[Array, "t heads dim"],
    weights: Float[Array, "t heads"],
    keys: _Keys,
    starts: Int[Array, " t"],
    ends: Int[Array, " t"],
    *,
    first: int = 0,
    last: int = 0,
    implementation: str | None = None,
) -> Float[Array, "t s"]:
    """Logits of contiguous keys, -inf outside each query's window `[starts, ends)`.

    Beside its result and copies of the result's size, `"xla"` holds one block of per-head products:
    at most 2**20 f32 on CPU, 2**26 elsewhere, provided that 4096 * heads is not more than that.

    Args:
        q: e4m3 or bf16 `[t, heads, dim]`.
        weights: f32 `[t, heads]`, the query's scale included (`quantize_index_query`).
        keys: token shape `[s]`. Those outside every window may hold anything, NaN included.
        starts: int32 `[t]`, first key of each window; below 0 means 0.
        ends: int32 `[t]`, one past the last; above `s` means `s`; not above `starts` means empty.
        first: keys at the start of a window whose logits are +inf, so that they are chosen.
        last: keys at its end, likewise.
        implementation: see the module.

    Returns:
        f32 `[t, s]`.

    Raises:
        ValueError: wrong shapes or dtypes.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    _check_query(q, weights, keys, rank=3)
    if len(keys.shape) != 1:
        raise ValueError(f"{keys.shape=}: expected token shape [s]; keys.flat() merges pages")
    check_int32("starts", starts, q.shape[:1])
    check_int32("ends", ends, q.shape[:1])
    check_forced(first, last)
    if _takes_kernel(q, keys, implementation):
        queries = _mosaic_logits.Queries(q[None], weights[None], starts[None], ends[None], None)
        return _mosaic_logits.logits(queries, keys, _mosaic_logits.Forced(first, last))[0]
    (num_keys,) = keys.shape
    count, size = _split(num_keys, _BLOCK_KEYS)
    extra = count * size - num_keys
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, extra), *((0, 0),) * (x.ndim - 1))), keys)
    blocks = padded.reshape(count, size)

    def tiled(budget: int) -> Callable[..., Array]:
        tokens = _tokens_per_block(budget, q.shape[0], q.shape[1] * size)

        def logits_of(q: Array, weights: Array, blocks: _Keys) -> Array:
            return _tiled_logits(q, weights, blocks, lambda block: block, tokens)

        return logits_of

    logits = _per_platform(tiled, q, weights, blocks)[:, :num_keys]
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    inside = (column >= starts[:, None]) & (column < ends[:, None])
    logits = jnp.where(inside, logits, -jnp.inf)
    if not first and not last:
        return logits
    starts, ends = jnp.maximum(starts, 0), jnp.minimum(ends, num_keys)
    return force_tokens(logits, ends - starts, first=first, last=last, row_starts=starts)


def paged_indexer_logits(
    q: Float[Array, "b s_q heads dim"],
    weights: Float[Array, "b s_q heads"],
    keys: _Keys,
    page_table: Int[Array, "b pages"],
    lengths: Int[Array, "b s_q"],
    *,
    first: int = 0,
    last: int = 0,
    implementation: str | None = None,
) -> Float[Array, "b s_q positions"]:
    """Logits of each request's own pages, in the order of its positions.

    `"xla"` holds one block of per-head products at a time (the bound of `indexer_logits`), and the
    keys that this block needs.

    Args:
        q: e4m3 or bf16 `[b, s_q, heads, dim]`.
        weights: f32 `[b, s_q, heads]`, the query's scale included.
        keys: token shape `[pages, page_size]`. Pages that no request uses may hold anything.
        page_table: int32 `[b, max_pages]`; entries past a request's end may hold anything.
        lengths: int32 `[b, s_q]`, how many positions each query sees.
        first: positions from 0 on whose logits are +inf where the query sees them.
        last: positions before the length, likewise.
        implementation: see the module.

    Returns:
        f32 `[b, s_q, max_pages * page_size]`, -inf at positions not below the length and at those
        whose page the cache does not have.

    Raises:
        ValueError: wrong shapes or dtypes.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    check_paged(q, weights, keys, page_table, lengths)
    b, s_q, heads, _ = q.shape
    check_forced(first, last)
    page_size = keys.shape[1]
    num_positions = page_table.shape[1] * page_size
    if 0 in (b, s_q, num_positions):
        return jnp.zeros((b, s_q, num_positions), jnp.float32)
    if _takes_kernel(q, keys, implementation):
        queries = _mosaic_logits.Queries(q, weights, None, lengths, page_table)
        return _mosaic_logits.logits(queries, keys, _mosaic_logits.Forced(first, last))

    positions = lax.broadcasted_iota(jnp.int32, (b, num_positions), 1)
    slots = paged_indices(positions, page_table, page_size=page_size)
    count, size = _split(num_positions, _BLOCK_KEYS)
    extra = count * size - num_positions
    blocks = jnp.pad(slots, ((0, 0), (0, extra)), constant_values=-1).reshape(b, count, size)
    flat = keys.flat()

    def tiled(budget: int) -> Callable[..., Array]:
        tokens = _tokens_per_block(budget, s_q, heads * size)
        requests = min(b, max(1, budget // max(1, tokens * heads * size)))

        def one_request(operands: tuple[Array, Array, Array]) -> Array:
            return _tiled_logits(*operands, flat.gather, tokens)

        def logits_of(*operands: Array) -> Array:
            return lax.map(one_request, operands, batch_size=requests)

        return logits_of

    logits = _per_platform(tiled, q, weights, blocks)[:, :, :num_positions]
    in_cache = (slots >= 0) & (slots < keys.num_slots)
    seen = (positions[:, None, :] < lengths[:, :, None]) & in_cache[:, None, :]
    logits = jnp.where(seen, logits, -jnp.inf)
    if not first and not last:
        return logits
    return force_tokens(logits, jnp.minimum(lengths, num_positions), first=first, last=last)


def force_tokens(
    logits: Float[Array, "*rows s"],
    lengths: Int[Array, "*rows"],
    *,
    first: int = 0,
    last: int = 0,
    row_starts: Int[Array, "*rows"] | None = None,
) -> Float[Array, "*rows s"]:
    """Logits with +inf on the first and last tokens of each window: `select_topk` takes those.

    Args:
        logits: f32 `[..., s]`.
        lengths: int32 `[...]`, window lengths; nothing outside a window changes.
        first: how many tokens at the window's start.
        last: how many tokens at its end.
        row_starts: int32 `[...]`, the column of each window's first token; None: column 0.

    Returns:
        f32 `[..., s]`.

    Raises:
        ValueError: wrong shapes or dtypes, or a negative `first` or `last`.
    """
    check_forced(first, last)
    check_int32("lengths", lengths, logits.shape[:-1])
    position = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    if row_starts is not None:
        check_int32("row_starts", row_starts, logits.shape[:-1])
        position = position - row_starts[..., None]
    inside = (position >= 0) & (position < lengths[..., None])
    forced = (position < first) | (position >= lengths[..., None] - last)
    return jnp.where(inside & forced, jnp.inf, logits)


def check_paged(q: Array, weights: Array, keys: _Keys, page_table: Array, lengths: Array) -> None:
    """Raises ValueError unless these are arguments of `paged_indexer_logits`."""
    _check_query(q, weights, keys, rank=4)
    if len(keys.shape) != 2:
        raise ValueError(f"{keys.shape=}: expected token shape [pages, page_size]")
    if page_table.ndim != 2:
        raise ValueError(f"{page_table.shape=}: expected [b, max_pages]")
    check_int32("page_table", page_table, (len(q), page_table.shape[1]))
    check_int32("lengths", lengths, q.shape[:2])


def check_forced(first: int, last: int) -> None:
    """Raises ValueError for negative numbers of tokens."""
    if first < 0 or last < 0:
        raise ValueError(f"{first=}, {last=}: expected numbers of tokens, at least 0")


def _check_query(q: Array, weights: Array, keys: _Keys, *, rank: int) -> None:
    keys.check()
    if q.ndim != rank or q.dtype not in (jnp.float8_e4m3fn, jnp.bfloat16):
        raise ValueError(
            f"{q.shape=}, {q.dtype=}: expected rank {rank}, e4m3 or bf16; see quantize_index_query"
        )
    if q.shape[-1] != keys.dim:
        raise ValueError(f"{q.shape=}, {keys.dim=}: expected the same last axis")
    if weights.shape != q.shape[:-1] or weights.dtype != jnp.float32:
        raise ValueError(
            f"{weights.shape=}, {weights.dtype=}: expected f32 {list(q.shape[:-1])}, one per head"
        )


def _takes_kernel(q: Array, keys: _Keys, implementation: str | None) -> bool:
    reasons = _mosaic_logits.unsupported_reasons(q, keys)
    return choose(implementation, reasons, _OTHERS) == "mosaic_gpu"


def _split(total: int, largest: int) -> tuple[int, int]:
    """Number and size of equal blocks, none above `largest`, that together hold `total`."""
    count = max(1, -(-total // largest))
    return count, -(-total // count)


def _tokens_per_block(budget: int, tokens: int, products_per_token: int) -> int:
    return _split(tokens, max(1, budget // max(1, products_per_token)))[1]


def _per_platform(tiled: Callable[[int], Callable[..., Array]], *operands: Any) -> Array:
    """Runs the op with the block budget of the platform that it is compiled for."""
    return lax.platform_dependent(
        *operands, cpu=tiled(_CPU_BLOCK_PRODUCTS), default=tiled(_BLOCK_PRODUCTS)
    )


def _tiled_logits(
    q: Array,
    weights: Array,
    key_blocks: Any,
    fetch: Callable[[Any], _Keys],
    tokens: int,
) -> Array:
    """Unmasked logits `[t, blocks * size]`; `fetch` turns a block of `key_blocks` into keys."""
    t, heads, dim = q.shape
    count = -(-t // max(1, tokens))
    extra = count * tokens - t
    q = jnp.pad(q, ((0, extra), (0, 0), (0, 0))).reshape(count, tokens, heads, dim)
    weights = jnp.pad(weights, ((0, extra), (0, 0))).reshape(count, tokens, heads)

    def token_block(operands: tuple[Array, Array]) -> Array:
        logits = lax.map(lambda block: _block_logits(*operands, fetch(block)), key_blocks)
        blocks, _, size = logits.shape
        return jnp.moveaxis(logits, 0, 1).reshape(tokens, blocks * size)

    logits = lax.map(token_block, (q, weights))
    return logits.reshape(count * tokens, logits.shape[-1])[:t]


def _block_logits(q: Array, weights: Array, rows: _Keys) -> Array:
    """`[tokens, heads, dim]`, `[tokens, heads]`, keys `(s,)` -> `[tokens, s]`."""
    # e4m3 is exact in bf16, and a bf16 product is exact in f32.
    products = lax.dot_general(
        q.astype(jnp.bfloat16),
        rows.keys.astype(jnp.bfloat16),
        (((2,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    weighted = jnp.sum(jnp.maximum(products, 0) * weights[:, :, None], axis=1)
    return weighted * rows.scales[None, :]
