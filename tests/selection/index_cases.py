"""Calls of the kernel of index logits, and what they give in f64."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jmla._mosaic_logits import Keys, Queries
from jmla.layouts.bf16_index_keys import BF16IndexKeyRows
from jmla.layouts.index_keys import IndexKeyRows
from jmla.layouts.paged_index_keys import paged_index_keys

GARBAGE = np.array([-1, np.iinfo(np.int32).min, np.iinfo(np.int32).max, 1 << 20])
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_STD = 110.0  # of codes


@dataclasses.dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        queries: with their windows and pages.
        keys: where the kernel reads them.
        codes: e4m3 [requests, s, dim], the same keys by the positions of each request.
        scales: f32 [requests, s], theirs.
        in_cache: bool [requests, s], whether a position has a page.
    """

    queries: Queries
    keys: Keys
    codes: np.ndarray
    scales: np.ndarray
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
        q, keys = _f64(self.queries.q), _f64(self.codes) * _f64(self.scales)[..., None]
        out = []
        for i in range(len(q)):
            t, heads, dim = q[i].shape
            products = np.maximum(q[i].reshape(-1, dim) @ keys[i].T, 0).reshape(t, heads, -1)
            out.append((_f64(self.queries.weights[i])[:, None] @ products)[:, 0])
        return np.where(self.seen(), np.stack(out), -np.inf)


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (_STD * rng.standard_normal(shape)).clip(-448, 448).astype(E4M3)


def _query(rng: np.random.Generator, *shape: int) -> tuple[Any, Any]:
    """Logits of the size of 1: a head's weight is that of a mean over heads and values."""
    weights = rng.standard_normal(shape[:-1]) * (shape[-1] * shape[-2]) ** -0.5 / _STD
    return jnp.asarray(_codes(rng, *shape)), jnp.asarray(weights, jnp.float32)


def _keys(rng: np.random.Generator, used: np.ndarray, dim: int) -> IndexKeyRows:
    """Keys with NaN in those that nobody sees."""
    codes = _codes(rng, *used.shape, dim)
    codes[~used] = np.nan
    scales = np.exp(rng.standard_normal(used.shape) / 4) / _STD
    scales[~used] = np.nan
    return IndexKeyRows(jnp.asarray(codes), jnp.asarray(scales, jnp.float32))


def paged(
    ends: Any,
    *,
    max_pages: int,
    page_size: int = 64,
    heads: int = 64,
    dim: int = 128,
    form: Literal["leaves", "packed", "bf16"] = "leaves",
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
    chosen = np.clip(table, 0, pages - 1)
    codes, scales = (np.asarray(part) for part in (keys.keys, keys.scales))
    rows = codes[chosen].reshape(requests, total, dim), scales[chosen].reshape(requests, total)
    where: Keys = keys
    if form == "bf16":
        # Numbers that e4m3 does not have.
        exact = codes.astype(np.float32) * 1.01
        stored = BF16IndexKeyRows(jnp.asarray(exact, jnp.bfloat16))
        own = np.asarray(stored.keys)[chosen].reshape(requests, total, dim)
        q, weights = _query(rng, requests, queries, heads, dim)
        given = Queries(
            (q.astype(jnp.float32) * 1.01).astype(jnp.bfloat16),
            weights / _STD,
            None,
            jnp.asarray(ends),
            jnp.asarray(table),
        )
        return Case(given, stored, own, np.ones((requests, total), np.float32), in_cache)
    if form == "packed":
        packed = np.full((pages, page_size * (dim + 4) + extra_bytes), 0xFF, np.uint8)
        behind = page_size * dim
        packed[:, :behind] = codes.view(np.uint8).reshape(pages, -1)
        packed[:, behind : behind + 4 * page_size] = scales.view(np.uint8)
        where = paged_index_keys(jnp.asarray(packed), page_size=page_size, dim=dim)
    q, weights = _query(rng, requests, queries, heads, dim)
    given = Queries(q, weights, None, jnp.asarray(ends), jnp.asarray(table))
    return Case(given, where, *rows, in_cache)


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
    codes, scales = (np.asarray(part)[None] for part in (keys.keys, keys.scales))
    return Case(given, keys, codes, scales, np.ones((1, num_keys), bool))
