"""The tokens that the lightning indexer chooses from a paged cache, without logits in between.

`paged_indexer_topk` is `jmla.paged_indexer_logits` and `jmla.select_topk` (or
`jmla.select_paged_indices`) in one step, with their results.

`implementation`:

- `"xla"` runs everywhere, as those two, with all logits in memory.
- `"mosaic_gpu"` is for Hopper (compute capability 9.0) and what both kernels serve. Of one query
  for each request, where requests are long enough that it pays, the kernel of the logits keeps what
  may be among the k largest, and only that is in memory: 49152 bytes for each request, and 132
  times that. Otherwise logits are, 4 bytes for each position of the page table.
- None is `"mosaic_gpu"` where JAX's default device is a GPU of compute capability 9.0 and the
  kernels serve the call, and `"xla"` otherwise.

Pooled keys: an index key may stand for several tokens that follow one another (`pool_index_keys`).
The tokens behind the last whole pool have no key, and are always chosen.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jmla import _implementation, _mosaic_indexer_topk, _mosaic_logits, _mosaic_topk
from jmla._checks import check_int32
from jmla.indexer import check_forced, check_paged, paged_indexer_logits
from jmla.layouts.bf16_index_keys import BF16IndexKeyRows
from jmla.layouts.index_keys import IndexKeyRows
from jmla.layouts.paged_index_keys import PagedIndexKeyRows
from jmla.topk import select_paged_indices, select_topk

_OTHERS = ("xla",)


def paged_indexer_topk(
    q: Float[Array, "b s_q heads dim"],
    weights: Float[Array, "b s_q heads"],
    keys: IndexKeyRows | PagedIndexKeyRows | BF16IndexKeyRows,
    page_table: Int[Array, "b pages"],
    lengths: Int[Array, "b s_q"],
    k: int,
    *,
    slots: bool = False,
    first: int = 0,
    last: int = 0,
    joined: bool | None = None,
    implementation: str | None = None,
) -> Int32[Array, "b s_q k"]:
    """The positions of the `k` keys with the largest logits for each query, or their slots.

    Args:
        q: as of `jmla.paged_indexer_logits`, and so are `weights`, `keys`, `page_table` and
            `lengths`.
        weights: see there.
        keys: see there.
        page_table: see there.
        lengths: see there.
        k: how many keys, as of `jmla.select_topk`.
        slots: whether the result has slots of the cache in the place of positions.
        first: positions from 0 on that are chosen in any case where the query sees them.
        last: positions before the length, likewise.
        joined: whether the kernel keeps candidates in the place of logits, which it can for
            `s_q` 1; None decides by the sizes as if all requests were as long as the page table.
            Where most are far shorter, False takes less time. `"xla"` has logits in any case.
        implementation: see the module.

    Returns:
        int32 `[b, s_q, k]`, in the order of positions, then -1.

    Raises:
        ValueError: wrong shapes or dtypes, or `k < 1`.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    check_paged(q, weights, keys, page_table, lengths)
    check_forced(first, last)
    if k < 1:
        raise ValueError(f"{k=}: expected at least 1")
    b, s_q = lengths.shape
    columns = page_table.shape[1] * keys.shape[1]
    reasons = [
        *_mosaic_logits.unsupported_reasons(q, keys),
        *_mosaic_topk.unsupported_reasons((b * s_q, columns), k),
    ]
    if joined and s_q != 1:
        reasons.append(f"{joined=}: the mosaic_gpu kernel expects one query per request: {s_q=}")
    if _implementation.choose(implementation, reasons, _OTHERS) == "mosaic_gpu":
        queries = _mosaic_logits.Queries(q, weights, None, lengths, page_table)
        forced = _mosaic_logits.Forced(first, last)
        return _mosaic_indexer_topk.positions(queries, keys, k, slots, forced, joined)
    logits = paged_indexer_logits(
        q, weights, keys, page_table, lengths, first=first, last=last, implementation="xla"
    ).reshape(b * s_q, columns)
    flat = lengths.reshape(-1)
    if slots:
        requests = jnp.repeat(jnp.arange(b, dtype=jnp.int32), s_q)
        chosen = select_paged_indices(
            logits,
            flat,
            k,
            page_table,
            page_size=keys.shape[1],
            requests=requests,
            implementation="xla",
        )
    else:
        chosen = select_topk(logits, flat, k, implementation="xla")
    return chosen.reshape(b, s_q, k)


def pool_index_keys(keys: Float[Array, "*t dim"], pool: int) -> Float[Array, "*pools dim"]:
    """The mean of each `pool` index keys that follow one another, in f32, in the dtype of the keys.

    Args:
        keys: bf16 or f32 `[..., n, dim]`, `n` a multiple of `pool`, of one request from a position
            on that `pool` divides.
        pool: tokens that share a key.

    Raises:
        ValueError: another number of keys.
    """
    if keys.ndim < 2 or pool < 1 or keys.shape[-2] % pool:
        raise ValueError(f"{keys.shape=}, {pool=}: expected [..., n, dim], n a multiple of pool")
    *leading, count, dim = keys.shape
    pools = keys.reshape(*leading, count // pool, pool, dim)
    return pools.astype(jnp.float32).mean(axis=-2).astype(keys.dtype)


def expand_pools(
    pools: Int[Array, "*rows k"], lengths: Int[Array, "*rows"], pool: int
) -> Int32[Array, "*rows wide"]:
    """The tokens of chosen pools, in order, then those behind the last whole pool.

    Of a query of `length` tokens, pools are chosen among `length // pool` keys.

    Args:
        pools: int32 `[..., k]`, numbers of pools; then -1, as `paged_indexer_topk` returns them.
        lengths: int32 `[...]`, in tokens.
        pool: tokens of a pool.

    Returns:
        int32 `[..., k * pool + pool - 1]`: positions of tokens, then -1.

    Raises:
        ValueError: wrong shapes or dtypes, or `pool < 1`.
    """
    if pool < 1:
        raise ValueError(f"{pool=}: expected at least 1")
    check_int32("lengths", lengths, pools.shape[:-1])
    k = pools.shape[-1]
    lengths = jnp.maximum(lengths, 0)[..., None]
    chosen = jnp.sum(pools >= 0, axis=-1, keepdims=True, dtype=jnp.int32)
    shape = (*pools.shape[:-1], k * pool + pool - 1)
    place = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    padded = jnp.pad(pools, [(0, 0)] * (pools.ndim - 1) + [(0, 1)])
    of_pool = jnp.repeat(padded, pool, axis=-1)[..., : shape[-1]] * pool + place % pool
    of_tail = place - chosen * pool + lengths // pool * pool
    position = jnp.where(place < chosen * pool, of_pool, of_tail)
    return jnp.where((place < chosen * pool) | (of_tail < lengths), position, -1)
