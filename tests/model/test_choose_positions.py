"""What the indexer of a layer chooses: rotated keys, keys in bf16, forced tokens, pools."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla.layouts import BF16IndexKeyRows, IndexKeyRows
from jmla.model import IndexerInputs, MLAConfig, choose_positions

PAGE, PAGES, HEADS, DIM, K = 8, 12, 3, 128, 20
LENGTH = PAGE * PAGES - 3


@functools.cache
def inputs() -> tuple[IndexerInputs, jax.Array]:
    """Of one token for each of two requests, and all keys, `[2, LENGTH, DIM]`."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, (2, 32))
    raw = jmla.RawIndexQueries(
        jnp.asarray(rng.standard_normal((2, HEADS, DIM)), jnp.bfloat16),
        jnp.asarray(rng.standard_normal((2, HEADS)), jnp.float32),
        jnp.asarray(np.cos(angle), jnp.float32),
        jnp.asarray(np.sin(angle), jnp.float32),
        interleaved=False,
    )
    keys = jnp.asarray(rng.standard_normal((2, LENGTH, DIM)), jnp.bfloat16)
    return IndexerInputs(raw.rotated(), raw.weights, keys[:, -1], raw), keys


def filled(index_keys: IndexKeyRows | BF16IndexKeyRows, keys: jax.Array) -> jmla.Cache:
    rows = jmla.init_cache(jmla.KVLayout.BF16, num_pages=2 * PAGES, page_size=PAGE).rows
    padded = jnp.pad(keys, ((0, 0), (0, PAGES * PAGE - LENGTH), (0, 0)))
    encode = jax.jit(type(index_keys).encode)
    return jmla.Cache(rows, encode(index_keys, padded.reshape(2 * PAGES, PAGE, DIM)))


def batch() -> jmla.BatchMeta:
    table = jnp.arange(2 * PAGES, dtype=jnp.int32).reshape(2, PAGES)
    lengths, new = jnp.full(2, LENGTH, jnp.int32), jnp.ones(2, jnp.int32)
    return jmla.make_batch(lengths, new, table, num_tokens=2, page_size=PAGE)


def best(scores: np.ndarray, k: int = K) -> np.ndarray:
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)


def scores_of(queries: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    products = np.maximum(np.einsum("bhd,bsd->bhs", queries, keys), 0)
    return np.einsum("bh,bhs->bs", weights, products)


def f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize(("phase", "raw"), [("decode", True), ("prefill", False)])
def test_a_cache_of_rotated_keys_is_scored_by_rotated_queries(phase, raw):
    indexer, keys = inputs()
    rotated = jmla.hadamard_rotation(keys)
    cache = filled(IndexKeyRows.zeros((0,), dim=DIM, hadamard=True), rotated)
    given = indexer if raw else dataclasses.replace(indexer, raw_queries=None)
    choose = functools.partial(choose_positions, k=K, phase=phase, implementation="xla")
    got = jax.jit(choose)(given, cache, batch())
    queries, weights = jax.jit(jmla.quantize_index_query)(
        jmla.hadamard_rotation(indexer.queries), indexer.weights
    )
    assert isinstance(cache.index_keys, IndexKeyRows)
    stored = f64(cache.index_keys.keys) * f64(cache.index_keys.scales)[..., None]
    stored = stored.reshape(2, -1, DIM)[:, :LENGTH]
    np.testing.assert_array_equal(got, best(scores_of(f64(queries), f64(weights), stored)))
    # Nearly what keys and queries give that are not rotated: but for what quantising changed.
    plain = best(scores_of(f64(indexer.queries), f64(indexer.weights), f64(keys)))
    assert np.mean([np.isin(a, b).mean() for a, b in zip(got, plain, strict=True)]) > 0.8


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_keys_in_bf16_are_scored_by_queries_as_they_are(phase):
    indexer, keys = inputs()
    cache = filled(BF16IndexKeyRows.zeros((0,), dim=DIM), keys)
    got = choose_positions(indexer, cache, batch(), K, phase=phase, implementation="xla")
    scores = scores_of(f64(indexer.queries), f64(indexer.weights), f64(keys))
    np.testing.assert_array_equal(got, best(scores))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_first_and_last_tokens_are_forced(phase):
    indexer, keys = inputs()
    cache = filled(BF16IndexKeyRows.zeros((0,), dim=DIM), keys)
    got = choose_positions(
        indexer, cache, batch(), K, phase=phase, first=3, last=5, implementation="xla"
    )
    scores = scores_of(f64(indexer.queries), f64(indexer.weights), f64(keys))
    scores[:, :3] = scores[:, -5:] = np.inf
    np.testing.assert_array_equal(got, best(scores))
    with pytest.raises(ValueError, match="index_local_tokens"):
        MLAConfig(hidden_size=8, num_heads=1, q_lora_rank=8, index_topk=9, index_local_tokens=10)


def test_bf16_keys_in_the_cache():
    cache = jmla.init_cache(
        jmla.KVLayout.BF16, num_pages=2, page_size=PAGE, index_dim=64, index_bf16=True
    )
    assert isinstance(cache.index_keys, BF16IndexKeyRows)
    latents, keys = jnp.ones((2, 576), jnp.bfloat16), jnp.full((2, 64), 1.01, jnp.float32)
    slots = jnp.array([3, 9], jnp.int32)
    after = jmla.append(cache, slots, latents, keys, implementation="xla")
    assert isinstance(after.index_keys, BF16IndexKeyRows)
    stored = after.index_keys.gather(slots).keys
    np.testing.assert_array_equal(stored, keys.astype(jnp.bfloat16))
    assert after.index_keys.bytes_per_token == 128
    with pytest.raises(ValueError, match="at most one"):
        jmla.init_cache(
            jmla.KVLayout.BF16, num_pages=2, index_dim=64, index_bf16=True, index_hadamard=True
        )


def test_pooled_keys_choose_the_tokens_of_pools():
    """Pages of 4 pooled keys for 8 tokens; the token behind the last whole pool comes along."""
    indexer, keys = inputs()
    whole = LENGTH // 2 * 2
    pooled = jmla.pool_index_keys(keys[:, :whole], 2)
    padded = jnp.pad(pooled, ((0, 0), (0, PAGES * 4 - whole // 2), (0, 0)))
    stored = BF16IndexKeyRows(padded.reshape(2 * PAGES, 4, DIM))
    lengths = jnp.full((2, 1), LENGTH, jnp.int32)
    pools = jmla.paged_indexer_topk(
        indexer.queries[:, None],
        indexer.weights[:, None],
        stored,
        batch().page_table,
        lengths // 2,
        K // 2,
        implementation="xla",
    )
    got = np.asarray(jmla.expand_pools(pools, lengths, 2))[:, 0]
    scores = scores_of(f64(indexer.queries), f64(indexer.weights), f64(pooled))
    for row, chosen in zip(got, best(scores, K // 2), strict=True):
        wanted = [token for pool in chosen for token in (2 * pool, 2 * pool + 1)]
        np.testing.assert_array_equal(row, [*wanted, LENGTH - 1])
