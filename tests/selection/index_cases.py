"""Calls of the kernel of index logits, and what they give in f64."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jmla._mosaic_logits import Keys, Queries
from jmla.indexer import quantize_index_query
from jmla.layouts.index_keys import IndexKeyRows, quantize_index_keys
from jmla.layouts.paged_index_keys import paged_index_keys

GARBAGE = np.array([-1, np.iinfo(np.int32).min, np.iinfo(np.int32).max, 1 << 20])


@dataclasses.dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        queries: with their windows and pages.
        keys: where the kernel reads them.
        rows: the same keys, of the positions of each request [requests, s], NaN where it sees none.
        in_cache: bool [requests, s], whether a position has a page.
    """

    queries: Queries
    keys: Keys
    rows: IndexKeyRows
    in_cache: np.ndarray

    def seen(self) -> np.ndarray:
        """bool [requests, queries, s]."""
        ends = np.asarray(self.queries.ends, np.int64)[..., None]
        starts = self.queries.starts
        first = 0 if starts is None else np.asarray(starts, np.int64)[..., None]
        position = np.arange(self.in_cache.shape[1])
        return (position >= first) & (position < ends) & self.in_cache[:, None]

    def expected(self) -> np.ndarray:
        """f64 [requests, queries, s]."""
        q, keys = (_f64(x) for x in (self.queries.q, self.rows.keys))
        keys = keys * _f64(self.rows.scales)[..., None]
        out = []
        for i in range(len(q)):
            t, heads, dim = q[i].shape
            products = np.maximum(q[i].reshape(-1, dim) @ keys[i].T, 0).reshape(t, heads, -1)
            out.append((_f64(self.queries.weights[i])[:, None] @ products)[:, 0])
        return np.where(self.seen(), np.stack(out), -np.inf)


def _f64(x: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def _query(rng: np.random.Generator, *shape: int) -> tuple[Any, Any]:
    """Logits of the size of their keys: a head's weight is 1 in the mean over heads and values."""
    q = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    weights = rng.standard_normal(shape[:-1]) * (shape[-1] * shape[-2]) ** -0.5
    return quantize_index_query(q, jnp.asarray(weights, jnp.float32))


def _keys(rng: np.random.Generator, used: np.ndarray, dim: int) -> IndexKeyRows:
    """Keys with NaN in those that nobody sees."""
    size = np.exp(rng.standard_normal((*used.shape, 1)) / 4)
    keys = quantize_index_keys(
        jnp.asarray(rng.standard_normal((*used.shape, dim)) * size, jnp.float32)
    )
    mask = jnp.asarray(used)
    return dataclasses.replace(
        keys,
        keys=jnp.where(mask[..., None], keys.keys, jnp.array(jnp.nan, keys.keys.dtype)),
        scales=jnp.where(mask, keys.scales, jnp.nan),
    )


def paged(
    ends: Any,
    *,
    max_pages: int,
    page_size: int = 64,
    heads: int = 64,
    dim: int = 128,
    form: Literal["leaves", "packed"] = "leaves",
    extra_bytes: int = 0,
    missing: int = 0,
    seed: int = 0,
) -> Case:
    """Requests whose page tables end in garbage; `missing` entries before are no pages."""
    rng = np.random.default_rng(seed)
    ends = np.asarray(ends, np.int32)
    requests, queries = ends.shape
    total = max_pages * page_size
    longest = np.clip(ends.max(axis=1), 0, total)
    needed = -(-longest // page_size)
    pages = int(needed.sum()) + 3
    order = rng.permutation(pages)
    table = rng.choice(GARBAGE, (requests, max_pages)).astype(np.int32)
    used = np.zeros((pages, page_size), bool)
    in_cache = np.zeros((requests, total), bool)
    first = 0
    for i in range(requests):
        own = order[first : first + needed[i]].astype(np.int32)
        first += needed[i]
        table[i, : needed[i]] = own
        gone = rng.permutation(needed[i])[:missing]
        table[i, gone] = [(-1, pages, 2**31 - 1, -(2**31))[n % 4] for n in range(len(gone))]
        for n, page in enumerate(own):
            if n not in gone:
                used[page, : max(0, longest[i] - n * page_size)] = True
                in_cache[i, n * page_size : (n + 1) * page_size] = True
    keys = _keys(rng, used, dim)
    slots = np.clip(table, 0, pages - 1).repeat(page_size, axis=1) * page_size
    rows = keys.flat().gather(jnp.asarray(slots + np.arange(total) % page_size))
    where: Keys = keys
    if form == "packed":
        packed = keys.pack(page_bytes=page_size * (dim + 4) + extra_bytes)
        where = paged_index_keys(packed, page_size=page_size, dim=dim)
    q, weights = _query(rng, requests, queries, heads, dim)
    given = Queries(q, weights, None, jnp.asarray(ends), jnp.asarray(table))
    return Case(given, where, rows, in_cache)


def ragged(
    starts: Any, ends: Any, num_keys: int, *, heads: int = 64, dim: int = 128, seed: int = 0
) -> Case:
    """Queries of one buffer of keys."""
    rng = np.random.default_rng(seed)
    starts, ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    position = np.arange(num_keys)
    used = ((position >= starts[:, None]) & (position < ends[:, None])).any(axis=0)
    keys = _keys(rng, used, dim)
    q, weights = _query(rng, 1, len(starts), heads, dim)
    first, last = (jnp.asarray(each[None], jnp.int32) for each in (starts, ends))
    given = Queries(q, weights, first, last, None)
    return Case(given, keys, keys.reshape(1, num_keys), np.ones((1, num_keys), bool))
