"""A prompt through a plan in chunks: what each token attends to depends on its position alone."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmla.batch import BatchMeta, make_batch
from jmla.cache import Cache, append
from jmla.plan import Plan

SPARE_PAGES = 3  # of the cache, that belong to nobody


class Prompt(NamedTuple):
    """One request whose pages lie in a random order.

    Attributes:
        length: tokens.
        latents: bf16 [length, width].
        q: bf16 [length, h, width].
        positions: int32 [length, k]; each token's own choice of what it sees, and -1.
        table: int32 [1, pages], and garbage at its end.
    """

    length: int
    latents: jax.Array
    q: jax.Array
    positions: jax.Array
    table: jax.Array

    def batch(self, end: int, new: int, page_size: int) -> BatchMeta:
        """The request with `end` tokens, the last `new` of which are queries."""
        lens = (jnp.array([end], jnp.int32), jnp.array([new], jnp.int32))
        return make_batch(*lens, self.table, num_tokens=new, page_size=page_size)


def prompt_of(plan: Plan, length: int, k: int) -> Prompt:
    """A random prompt of the plan's sizes, whose tokens attend to `k` positions at most."""
    config, rng = plan.config, np.random.default_rng(length)
    width = config.kv_lora_rank + config.rope_dim
    pages = -(-length // config.page_size)
    table = np.concatenate([rng.permutation(pages + SPARE_PAGES)[:pages], [-1, 2147480000]])
    positions = np.full((length, k), -1, np.int32)
    for token in range(length):
        chosen = rng.permutation(token + 1)[:k]
        positions[token, : chosen.size] = chosen
    return Prompt(
        length,
        jnp.asarray(rng.normal(size=(length, width)), jnp.bfloat16),
        jnp.asarray(0.3 * rng.normal(size=(length, config.num_heads, width)), jnp.bfloat16),
        jnp.asarray(positions),
        jnp.asarray(table[None], jnp.int32),
    )


def prefilled(
    plan: Plan, prompt: Prompt, chunks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, Cache]:
    """out and lse of all tokens, appended and prefilled chunk by chunk; and the cache then.

    Until a token is appended its row holds poison, and pages that belong to nobody keep it.
    """
    page_size = plan.config.page_size
    cache = _poisoned(plan.init_cache(prompt.table.shape[1] - 2 + SPARE_PAGES))
    outs, lses, end = [], [], 0
    for chunk in chunks:
        own = slice(end, end + chunk)
        end += chunk
        batch = prompt.batch(end, chunk, page_size)
        cache = append(cache, batch.write_slots, prompt.latents[own])
        out, lse = plan.prefill(prompt.q[own], cache, batch, prompt.positions[own])
        outs.append(np.asarray(out, np.float32))
        lses.append(np.asarray(lse))
    assert end == prompt.length
    return np.concatenate(outs), np.concatenate(lses), cache


def decoded(plan: Plan, prompt: Prompt, cache: Cache, token: int) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of one token, by a decode step at its position."""
    own = slice(token, token + 1)
    batch = prompt.batch(token + 1, 1, plan.config.page_size)
    out, lse = plan.decode(prompt.q[own][:, None], cache, batch, prompt.positions[own])
    return np.asarray(out[0, 0], np.float32), np.asarray(lse[0, 0])


def _poisoned(cache: Cache) -> Cache:
    def poison(leaf: jax.Array) -> jax.Array:
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 255
        return jnp.full_like(leaf, jnp.asarray(bad, leaf.dtype))

    scale = getattr(cache.rows, "scale", None)
    rows = jax.tree.map(lambda x: x if x is scale else poison(x), cache.rows)
    return dataclasses.replace(cache, rows=rows)
