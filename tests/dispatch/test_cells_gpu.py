"""Every cell of the compatibility table that says yes, run on a Hopper against the reference.

The cases are the table's own: what is added there is run here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import GQAPlan, append, make_batch, quantize_key_values
from jmla.cache import Cache
from jmla.dispatch.cells import Cell
from jmla.plan import Plan
from tests.attention.exact import random_paging
from tests.dispatch.test_cells import YES, resolve_cell
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("hopper")

LENGTHS = [70, 129, 1]
CASES = [
    pytest.param(cell, page_size, id=f"{cell} pages of {page_size}")
    for cell in YES
    for page_size in cell.page_sizes or (1, 16, 64, 128)
]


def random_values(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize(("cell", "page_size"), CASES)
def test_yes_runs(cell: Cell, page_size: int) -> None:
    """By the kernel where the table says so, which is then named: it raises if it cannot serve."""
    plan = resolve_cell(cell, page_size, "mosaic_gpu" if cell.kernel else None)
    wanted = resolve_cell(cell, page_size, "reference")
    if isinstance(plan, GQAPlan):
        assert isinstance(wanted, GQAPlan)
        results = [run_heads(each, s_q) for s_q in (1, 2) for each in (plan, wanted)]
    else:
        assert isinstance(wanted, Plan)
        cache, paging = filled(plan)
        if cell.phase == "prefill":
            results = [run_prefill(each, cache, paging) for each in (plan, wanted)]
        else:
            results = [
                run_decode(each, cache, paging, s_q) for s_q in (1, 2) for each in (plan, wanted)
            ]
    for ours, reference in zip(results[::2], results[1::2], strict=True):
        # The kernels do not round FP8 values to bf16 on the way, the reference does.
        assert_close(ours[0], reference[0], abs_tol=2e-2, rel_tol=2.01 / 128)
        assert_close(ours[1], reference[1], abs_tol=5e-3, rel_tol=1e-3)


def filled(plan: Plan) -> tuple[Cache, Any]:
    """The cache with all tokens in it, NaN or 255 everywhere else, and its pages."""
    config = plan.config
    paging = random_paging(config.page_size, config.page_size, LENGTHS)
    cache = plan.init_cache(paging.pages)

    def poison(leaf: jax.Array) -> jax.Array:
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 255
        return jnp.full_like(leaf, bad)

    cache = dataclasses.replace(cache, rows=jax.tree.map(poison, cache.rows))
    slots = jnp.asarray(paging.slots[paging.slots >= 0])
    latents = random_values(1, len(slots), config.kv_lora_rank + config.rope_dim)
    if cache.index_keys is None:
        return append(cache, slots, latents), paging
    keys = random_values(2, len(slots), config.index_head_dim or 0)
    return append(cache, slots, latents, keys), paging


def run_prefill(plan: Plan, cache: Cache, paging: Any) -> tuple[Any, Any]:
    """The last tokens of a batch, of which one request has a prefix."""
    new = [5, 129, 1]
    batch = make_batch(
        jnp.asarray(LENGTHS, jnp.int32),
        jnp.asarray(new, jnp.int32),
        jnp.asarray(paging.table, jnp.int32),
        num_tokens=sum(new) + 3,
        page_size=plan.config.page_size,
    )
    return plan.prefill(queries(plan, sum(new) + 3), cache, batch, selection(batch.lengths))


def run_decode(plan: Plan, cache: Cache, paging: Any, s_q: int) -> tuple[Any, Any]:
    """An idle request is among them."""
    lengths = [*LENGTHS[:2], 0]
    batch = make_batch(
        jnp.asarray(lengths, jnp.int32),
        jnp.full(3, s_q, jnp.int32),
        jnp.asarray(paging.table, jnp.int32),
        num_tokens=3 * s_q,
        page_size=plan.config.page_size,
    )
    return plan.decode(queries(plan, 3, s_q), cache, batch, selection(batch.lengths))


def run_heads(plan: GQAPlan, s_q: int) -> tuple[Any, Any]:
    config = plan.config
    paging = random_paging(config.page_size, config.page_size, LENGTHS)
    slots = jnp.asarray(paging.slots[paging.slots >= 0])
    keys, values = (random_values(i, len(slots), 4, 128) for i in (1, 2))
    cache = plan.init_cache(paging.pages)
    cache = cache.set(slots, quantize_key_values(keys, values, plan.kv_cache_dtype))
    return plan.decode(
        random_values(0, 3, s_q, config.num_heads, config.head_dim),
        cache,
        jnp.asarray(paging.table, jnp.int32),
        jnp.asarray([*LENGTHS[:2], 0], jnp.int32),
    )


def queries(plan: Plan, *shape: int) -> jax.Array:
    config = plan.config
    return random_values(3, *shape, config.num_heads, config.kv_lora_rank + config.rope_dim)


def selection(lengths: jax.Array) -> jax.Array:
    """Half of the positions that each token sees, and some that it does not."""
    positions = np.full((lengths.size, 192), -1, np.int32)
    for row, length in enumerate(np.asarray(lengths)):
        chosen = np.random.default_rng(int(length)).permutation(length + 5)[: length // 2 + 3]
        positions[row, : len(chosen)] = chosen
    return jnp.asarray(positions)
