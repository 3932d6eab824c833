"""Indexer logits through XLA against f64 numpy on dequantised keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

import jmla
from jmla.index_query import quantize_index_query
from jmla.indexer import force_tokens
from jmla.layouts.index_keys import IndexKeyRows, quantize_index_keys
from jmla.topk import select_topk
from tests.helpers import assert_close

# On a Hopper the default is the kernel, whose sums have fewer bits.
indexer_logits = functools.partial(jmla.indexer_logits, implementation="xla")
paged_indexer_logits = functools.partial(jmla.paged_indexer_logits, implementation="xla")

DIM = 128
GARBAGE = 2147480000
INT_MAX = np.iinfo(np.int32).max
INT_MIN = np.iinfo(np.int32).min


def random_keys(rng: np.random.Generator, *shape: int) -> IndexKeyRows:
    scale = np.exp(rng.standard_normal((*shape, 1)))
    return quantize_index_keys(jnp.asarray(rng.standard_normal((*shape, DIM)) * scale, jnp.float32))


def random_query(
    rng: np.random.Generator, *shape: int, heads: int = 5
) -> tuple[jax.Array, jax.Array]:
    q = jnp.asarray(rng.standard_normal((*shape, heads, DIM)), jnp.float32)
    return quantize_index_query(q, jnp.asarray(rng.standard_normal((*shape, heads)), jnp.float32))


def unused(keys: IndexKeyRows, used: np.ndarray) -> IndexKeyRows:
    """The keys with NaN in values and scales wherever `used` is False."""
    mask = jnp.asarray(used)
    return dataclasses.replace(
        keys,
        keys=jnp.where(mask[..., None], keys.keys, jnp.array(jnp.nan, keys.keys.dtype)),
        scales=jnp.where(mask, keys.scales, jnp.nan),
    )


def f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def oracle(q: jax.Array, weights: jax.Array, keys: IndexKeyRows) -> np.ndarray:
    """f64 logits `[t, s]` of queries `[t, heads, dim]` and keys `(s,)`, without windows."""
    products = np.einsum("thd,sd->ths", f64(q), f64(keys.keys) * f64(keys.scales)[:, None])
    return np.einsum("ths,th->ts", np.maximum(products, 0), f64(weights))


def assert_logits(ours: jax.Array, want: np.ndarray) -> None:
    assert ours.dtype == jnp.float32
    size = np.abs(want[np.isfinite(want)]).max(initial=1e-30)
    assert_close(ours, want, abs_tol=2e-6 * float(size), rel_tol=1e-5)


def test_query_scale_moves_into_the_weight() -> None:
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((3, 4, DIM)) * 50, jnp.bfloat16)
    weights = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    q8, folded = quantize_index_query(q, weights)
    assert q8.dtype == jnp.float8_e4m3fn
    assert folded.dtype == jnp.float32
    scale = f64(folded) / f64(weights)
    np.testing.assert_array_equal(scale, 2.0 ** np.round(np.log2(scale)))
    assert_close(f64(q8) * scale[..., None], f64(q), abs_tol=1e-3, rel_tol=2**-4)
    assert not f64(quantize_index_query(jnp.zeros((1, 2, DIM)), jnp.ones((1, 2)))[0]).any()


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1), (7, 33), (40, 5)]),
    bf16_query=st.booleans(),
)
def test_logits_and_windows(seed: int, shape: tuple[int, int], bf16_query: bool) -> None:
    rng = np.random.default_rng(seed)
    t, s = shape
    starts = rng.integers(-2, s + 2, t).astype(np.int32)
    ends = rng.integers(-2, s + 2, t).astype(np.int32)
    ends[0], starts[-1] = INT_MAX, INT_MIN
    position = np.arange(s)
    inside = (position >= starts[:, None]) & (position < ends[:, None])
    keys = random_keys(rng, s)
    q, weights = random_query(rng, t)
    if bf16_query:
        q = jnp.asarray(rng.standard_normal(q.shape), jnp.bfloat16)
    want = np.where(inside, oracle(q, weights, keys), -np.inf)
    seen = unused(keys, inside.any(axis=0))
    ours = jax.jit(indexer_logits)(q, weights, seen, jnp.asarray(starts), jnp.asarray(ends))
    assert_logits(ours, want)


def test_a_nan_key_inside_another_queries_window_stays_there() -> None:
    rng = np.random.default_rng(1)
    keys = unused(random_keys(rng, 9), np.arange(9) != 4)
    q, weights = random_query(rng, 2)
    starts, ends = jnp.array([0, 0], jnp.int32), jnp.array([4, 9], jnp.int32)
    logits = indexer_logits(q, weights, keys, starts, ends)
    np.testing.assert_array_equal(np.isnan(logits), np.arange(18).reshape(2, 9) == 13)
    np.testing.assert_array_equal(select_topk(logits, ends, 8)[1], [0, 1, 2, 3, 5, 6, 7, 8])


def test_more_keys_and_tokens_than_one_block() -> None:
    rng = np.random.default_rng(2)
    t, s = 83, 4099
    keys = random_keys(rng, s)
    q, weights = random_query(rng, t, heads=17)
    starts, ends = jnp.zeros(t, jnp.int32), jnp.full(t, s, jnp.int32)
    logits = indexer_logits(q, weights, keys, starts, ends)
    assert_logits(logits, oracle(q, weights, keys))


@pytest.mark.parametrize(("t", "s"), [(0, 4), (3, 0), (0, 0)])
def test_empty(t: int, s: int) -> None:
    rng = np.random.default_rng(3)
    q, weights = random_query(rng, t)
    zeros = jnp.zeros(t, jnp.int32)
    assert indexer_logits(q, weights, random_keys(rng, s), zeros, zeros).shape == (t, s)


@pytest.mark.parametrize(
    ("b", "s_q", "pages", "max_pages"), [(0, 1, 3, 2), (2, 0, 3, 2), (2, 1, 3, 0), (2, 1, 0, 2)]
)
def test_empty_paged(b: int, s_q: int, pages: int, max_pages: int) -> None:
    rng = np.random.default_rng(4)
    q, weights = random_query(rng, b, s_q)
    table, lengths = jnp.zeros((b, max_pages), jnp.int32), jnp.ones((b, s_q), jnp.int32)
    logits = paged_indexer_logits(q, weights, random_keys(rng, pages, 4), table, lengths)
    assert logits.shape == (b, s_q, max_pages * 4)
    if pages == 0:
        assert np.isneginf(logits).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    page_size=st.sampled_from([1, 53, 64]),
    s_q=st.sampled_from([1, 3]),
)
def test_paged(seed: int, page_size: int, s_q: int) -> None:
    rng = np.random.default_rng(seed)
    b, max_pages, num_pages = 3, 4, 14
    positions = max_pages * page_size
    table = rng.permutation(num_pages)[: b * max_pages].reshape(b, max_pages).astype(np.int32)
    lengths = rng.integers(0, positions + 1, (b, s_q)).astype(np.int32)
    lengths[0, 0], lengths[-1, -1] = 0, rng.choice([-3, positions, positions + 5])
    keys = random_keys(rng, num_pages, page_size)
    used = np.zeros((num_pages, page_size), bool)
    want = np.full((b, s_q, positions), -np.inf)
    q, weights = random_query(rng, b, s_q)
    for i in range(b):
        longest = min(max(int(lengths[i].max()), 0), positions)
        p = np.arange(longest)
        page, offset = table[i, p // page_size], p % page_size
        used[page, offset] = True
        logits = oracle(q[i], weights[i], keys.gather(jnp.asarray(page * page_size + offset)))
        want[i, :, :longest] = np.where(p < lengths[i][:, None], logits, -np.inf)
        # Tails: no page at all, or another request's, or one full of NaN.
        table[i, -(-longest // page_size) :] = rng.choice([GARBAGE, -1, INT_MIN, num_pages, 0])
    ours = jax.jit(paged_indexer_logits)(
        q, weights, unused(keys, used), jnp.asarray(table), jnp.asarray(lengths)
    )
    assert_logits(ours, want)


def test_paged_across_blocks_of_keys_and_requests_that_miss_pages() -> None:
    rng = np.random.default_rng(5)
    b, page_size, max_pages = 2, 64, 65  # 4160 positions
    keys = random_keys(rng, 3, page_size)
    table = rng.integers(0, 3, (b, max_pages)).astype(np.int32)
    table[1, 7], table[1, 8] = -1, 3
    q, weights = random_query(rng, b, 1)
    logits = paged_indexer_logits(
        q, weights, keys, jnp.asarray(table), jnp.full((b, 1), max_pages * page_size, jnp.int32)
    )
    by_page = np.stack([oracle(q[i], weights[i], keys.flat())[0] for i in range(b)])
    by_page = by_page.reshape(b, 3, page_size)
    want = np.stack([by_page[i][table[i] % 3] for i in range(b)])
    want[1, 7:9] = -np.inf
    assert_logits(logits, want.reshape(b, 1, -1))


def test_forced_tokens() -> None:
    logits = jnp.zeros((4, 6))
    lengths = jnp.array([0, 2, 5, 6], jnp.int32)
    forced = np.isposinf(force_tokens(logits, lengths, first=1, last=2))
    want = np.array(["000000", "110000", "100110", "100011"])
    np.testing.assert_array_equal(forced, [[c == "1" for c in row] for row in want])
    window = force_tokens(
        logits[:1], jnp.array([3], jnp.int32), first=1, row_starts=jnp.array([2], jnp.int32)
    )
    np.testing.assert_array_equal(np.isposinf(window[0]), np.arange(6) == 2)
    np.testing.assert_array_equal(force_tokens(logits, lengths), logits)
    nan = force_tokens(jnp.full((1, 6), jnp.nan), jnp.array([4], jnp.int32), last=1)
    np.testing.assert_array_equal(np.isnan(nan[0]), np.arange(6) != 3)


def test_prefill_memory_is_bounded() -> None:
    t, s, heads = 4096, 4096, 64
    q = jax.ShapeDtypeStruct((t, heads, DIM), jnp.float8_e4m3fn)
    weights = jax.ShapeDtypeStruct((t, heads), jnp.float32)
    keys = jax.eval_shape(lambda k: quantize_index_keys(k), jax.ShapeDtypeStruct((s, DIM), "f4"))
    window = jax.ShapeDtypeStruct((t,), jnp.int32)
    compiled = jax.jit(indexer_logits).lower(q, weights, keys, window, window).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # All products at once are 4 GiB; the result is 64 MiB. A GPU's steps are wider.
    assert analysis.temp_size_in_bytes < (96 if jax.default_backend() == "cpu" else 640) << 20


def test_paged_memory_is_bounded() -> None:
    b, pages, page_size, heads = 64, 2048, 64, 64
    q = jax.ShapeDtypeStruct((b, 1, heads, DIM), jnp.float8_e4m3fn)
    weights = jax.ShapeDtypeStruct((b, 1, heads), jnp.float32)
    keys = jax.eval_shape(
        lambda k: quantize_index_keys(k), jax.ShapeDtypeStruct((pages, page_size, DIM), "f4")
    )
    table = jax.ShapeDtypeStruct((b, 256), jnp.int32)
    lengths = jax.ShapeDtypeStruct((b, 1), jnp.int32)
    compiled = jax.jit(paged_indexer_logits).lower(q, weights, keys, table, lengths).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # All products at once are 256 MiB, all gathered keys 128 MiB; the result is 4 MiB.
    assert analysis.temp_size_in_bytes < (64 if jax.default_backend() == "cpu" else 192) << 20


def test_jit_vmap_export_shard_map() -> None:
    rng = np.random.default_rng(6)
    n, b, page_size = 2, 2, 4
    keys = random_keys(rng, 6, page_size)
    q, weights = random_query(rng, n, b, 2)
    table = jnp.asarray(rng.integers(0, 6, (n, b, 3)), jnp.int32)
    lengths = jnp.asarray(rng.integers(0, 13, (n, b, 2)), jnp.int32)

    def both(
        q: jax.Array, weights: jax.Array, keys: IndexKeyRows, table: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        ends = lengths[:, 0]
        starts = jnp.zeros_like(ends)
        return (
            paged_indexer_logits(q, weights, keys, table, lengths),
            indexer_logits(q[:, 0], weights[:, 0], keys.flat(), starts, ends),
        )

    want = [both(q[i], weights[i], keys, table[i], lengths[i]) for i in range(n)]
    mapped = jax.jit(jax.vmap(both, in_axes=(0, 0, None, 0, 0)))(q, weights, keys, table, lengths)
    arguments = (q[0], weights[0], keys, table[0], lengths[0])
    paged = jax.jit(lambda q, w, k, s, t, n: paged_indexer_logits(q, w, type(keys)(k, s), t, n))
    raw = (*arguments[:2], keys.keys, keys.scales, *arguments[3:])
    exported = jax.export.export(paged, platforms=("cpu", "cuda"))(*raw).call(*raw)
    mesh = Mesh(np.array(jax.devices()[:2]), ("b",))
    spec = PartitionSpec("b")
    sharded = jax.jit(
        jax.shard_map(
            both, mesh=mesh, in_specs=(spec, spec, PartitionSpec(), spec, spec), out_specs=spec
        )
    )(*arguments)
    for which in range(2):
        stacked = np.stack([np.asarray(w[which], np.float64) for w in want])
        assert_logits(mapped[which], stacked)
        assert_logits(sharded[which], stacked[0])
    assert_logits(exported, np.asarray(want[0][0], np.float64))


def test_wrong_arguments() -> None:
    rng = np.random.default_rng(7)
    q, weights = random_query(rng, 2)
    keys, zeros = random_keys(rng, 6), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"q\.dtype"):
        indexer_logits(q.astype(jnp.float32), weights, keys, zeros, zeros)
    with pytest.raises(ValueError, match="expected the same last axis"):
        indexer_logits(q[..., :64], weights, keys, zeros, zeros)
    with pytest.raises(ValueError, match=r"weights\.shape"):
        indexer_logits(q, weights[:, :1], keys, zeros, zeros)
    with pytest.raises(ValueError, match="flat"):
        indexer_logits(q, weights, keys.reshape(2, 3), zeros, zeros)
    with pytest.raises(ValueError, match="ends: got"):
        indexer_logits(q, weights, keys, zeros, zeros[:1])
    table, lengths = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="page_size"):
        paged_indexer_logits(q[:, None], weights[:, None], keys, table, lengths)
    with pytest.raises(ValueError, match="page_table: got"):
        paged_indexer_logits(q[:, None], weights[:, None], keys.reshape(2, 3), table[:1], lengths)
    with pytest.raises(ValueError, match="lengths: got"):
        paged_indexer_logits(q[:, None], weights[:, None], keys.reshape(2, 3), table, lengths[:, 0])
    with pytest.raises(ValueError, match="heads"):
        quantize_index_query(q.astype(jnp.float32), weights[:1])
    with pytest.raises(ValueError, match="first=-1"):
        force_tokens(jnp.zeros((2, 3)), zeros, first=-1)
