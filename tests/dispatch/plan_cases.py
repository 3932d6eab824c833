"""A small cache, its batches, and attention to it written out in numpy.

Three requests of uneven length over shuffled pages; the page table's tail is garbage and pages
that nobody owns are poisoned where the layout can hold NaN. The numpy attention reads the
dequantised cache, so that what a layout rounds away is in both.
"""

import dataclasses
import warnings
from functools import cache as memoise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmla.backends import backends_of, layouts_read
from jmla.batch import BatchMeta, make_batch
from jmla.cache import Cache, append
from jmla.config import Config
from jmla.dispatch.resolve import resolve
from jmla.layouts.base import KVLayout
from jmla.phase_plan import DecodePlan, PrefillPlan
from jmla.plan import Plan
from tests.helpers import assert_close

RANK, ROPE, HEADS, PAGE = 128, 64, 3, 64
LENGTHS = (70, 129, 1)
PAGES = 9
PAGE_TABLE = np.array([[4, 1, -1, 2147480000], [7, 0, 5, 2147480000], [2, -7, 99, 2147480000]])
OWNED = ((4, 1), (7, 0, 5), (2,))
ALL = 192  # selects every token of the longest request
SINK = np.array([0.5, -np.inf, 2.0], np.float32)


def plan_of(layout: KVLayout, **changes: Any) -> Plan:
    sizes: dict[str, Any] = {
        "num_heads": HEADS,
        "sm_scale": 0.09,
        "layout": layout,
        "kv_lora_rank": RANK,
        "rope_dim": ROPE,
        "index_head_dim": None,
        "platform": "cpu",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(Config(**{**sizes, **changes}))


def batch_of(seq_lens: Any, new_lens: Any, num_tokens: int) -> BatchMeta:
    return make_batch(
        jnp.asarray(seq_lens, jnp.int32),
        jnp.asarray(new_lens, jnp.int32),
        jnp.asarray(PAGE_TABLE, jnp.int32),
        num_tokens=num_tokens,
        page_size=PAGE,
    )


def latents_of(batch: BatchMeta) -> jax.Array:
    """The latent of each of the batch's tokens: a function of request and position alone."""
    everything = np.random.default_rng(0).normal(size=(len(LENGTHS), 256, RANK + ROPE)) * 1.5
    request, position = np.asarray(batch.token_request), np.asarray(batch.token_position)
    return jnp.asarray(everything[request, position], jnp.bfloat16)


def selection(batch: BatchMeta, k: int, *, seed: int) -> jax.Array:
    """At most `k` of the positions that each token sees, in `ALL` columns whatever `k` is.

    What is chosen depends on the token's position alone, not on the batch around it.
    """
    scores = np.random.default_rng(seed).normal(size=(ALL, ALL))
    positions = np.full((batch.token_request.size, ALL), -1, np.int32)
    for row, length in enumerate(np.asarray(batch.lengths)):
        chosen = np.sort(np.argsort(scores[length, :length])[:k])
        positions[row, : chosen.size] = chosen
    return jnp.asarray(positions)


def queries(*shape: int, seed: int = 1) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(*shape, HEADS, RANK + ROPE)), jnp.bfloat16)


@memoise
def filled(layout: KVLayout) -> Cache:
    """A cache with all tokens of all requests in it, and poison in the pages without an owner."""
    cache = plan_of(layout).init_cache(PAGES)
    batch = batch_of(LENGTHS, LENGTHS, sum(LENGTHS))
    return append(poisoned(cache), batch.write_slots, latents_of(batch))


def poisoned(cache: Cache) -> Cache:
    orphans = np.setdiff1d(np.arange(PAGES), np.concatenate(OWNED))
    assert orphans.size

    def poison(leaf: jax.Array) -> jax.Array:
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 255
        return leaf.at[orphans].set(jnp.asarray(bad, leaf.dtype))

    return dataclasses.replace(cache, rows=jax.tree.map(poison, cache.rows))


def expected(
    cache: Cache,
    q: jax.Array,
    requests: Any,
    lengths: Any,
    positions: Any,
    sm_scale: float,
    sink: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of each query token to its selected positions below its length, in f64."""
    latents = np.asarray(cache.rows.dequantize(), np.float64)
    value_dim = cache.rows.value_dim
    out = np.zeros((len(requests), HEADS, value_dim))
    lse = np.full((len(requests), HEADS), -np.inf)
    for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        seen = [p for p in np.asarray(positions[row]) if 0 <= p < length]
        if request < 0 or not seen:
            continue
        keys = np.stack([latents[PAGE_TABLE[request][p // PAGE], p % PAGE] for p in seen])
        logits = sm_scale * np.asarray(q[row], np.float64) @ keys.T
        weights = np.exp(logits)
        total = weights.sum(-1)
        lse[row] = np.log(total)
        if sink is not None:
            total = total + np.exp(sink.astype(np.float64))
        out[row] = weights @ keys[:, :value_dim] / total[:, None]
    return out, lse


def check(got: tuple[jax.Array, jax.Array], reference: tuple[np.ndarray, np.ndarray]) -> None:
    out, lse = got
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    out_tol, rel_tol = 1e-2, 2.01 / 128
    assert_close(out.reshape(reference[0].shape), reference[0], abs_tol=out_tol, rel_tol=rel_tol)
    assert_close(lse.reshape(reference[1].shape), reference[1], abs_tol=1e-4, rel_tol=1e-5)


def run_prefill(plan: PrefillPlan, cache: Cache, k: int) -> tuple[jax.Array, jax.Array]:
    """The last tokens of a batch in which one request has a prefix, and some padding."""
    batch, positions = prefill_case(k)
    return plan(queries(batch.token_request.size), cache, batch, positions)


def prefill_case(k: int) -> tuple[BatchMeta, jax.Array]:
    batch = batch_of(LENGTHS, (5, 129, 1), 140)
    return batch, selection(batch, k, seed=2)


def run_decode(plan: DecodePlan, cache: Cache, k: int) -> tuple[jax.Array, jax.Array]:
    """Two draft tokens per request; the last request is idle."""
    batch, positions = decode_case(k)
    return plan(queries(3, 2, seed=3), cache, batch, positions)


def decode_case(k: int) -> tuple[BatchMeta, jax.Array]:
    batch = batch_of((70, 129, 0), (2, 2, 2), 6)
    return batch, selection(batch, k, seed=4)


def expected_prefill(cache: Cache, k: int, sm_scale: float) -> tuple[np.ndarray, np.ndarray]:
    batch, positions = prefill_case(k)
    requests, lengths = np.asarray(batch.token_request), np.asarray(batch.lengths)
    return expected(cache, queries(140), requests, lengths, np.asarray(positions), sm_scale)


def expected_decode(cache: Cache, k: int, sm_scale: float) -> tuple[np.ndarray, np.ndarray]:
    batch, positions = decode_case(k)
    requests, lengths = np.asarray(batch.token_request), np.asarray(batch.lengths)
    q = queries(3, 2, seed=3).reshape(6, HEADS, -1)
    return expected(cache, q, requests, lengths, np.asarray(positions), sm_scale)


def readers(layout: KVLayout) -> tuple[list[str], list[str]]:
    prefills = [name for name in backends_of("prefill") if layout in layouts_read(name, "prefill")]
    decodes = [name for name in backends_of("decode") if layout in layouts_read(name, "decode")]
    return prefills, decodes
