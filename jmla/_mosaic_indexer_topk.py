"""The indexer's choice through the Hopper kernels of `pallas_kernels`: the call.

`pallas_kernels` is imported by the call and not by this module: importing Pallas takes as long as
importing the rest of jmla.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jmla import _mosaic_logits
from jmla._mosaic_logits import Forced, Keys, Queries


def positions(
    queries: Queries, keys: Keys, k: int, slots: bool, forced: Forced, joined: bool | None
) -> Int32[Array, "requests queries k"]:
    """`jmla.paged_indexer_topk` of arguments that the reasons of both kernels say nothing against.

    vmap runs the kernels once for each entry.
    """
    return _compiled(queries, keys, k, slots, forced, joined)


def _mapped(
    queries: Queries, keys: Keys, k: int, slots: bool, forced: Forced, joined: bool | None
) -> Array:
    # Positions have no derivatives, and the kernels have no rule for any.
    q, weights = jax.lax.stop_gradient((queries.q, queries.weights))
    launch = functools.partial(_launch, k, slots, forced, joined)
    queries = queries._replace(q=q, weights=weights)
    return jax.custom_batching.sequential_vmap(launch)(queries, keys)


# Compiled at the level of the module: a call outside jit would compile the kernels every time.
_compiled = jax.jit(_mapped, static_argnums=(2, 3, 4, 5))


def _launch(
    k: int, slots: bool, forced: Forced, joined: bool | None, queries: Queries, keys: Keys
) -> Array:
    from pallas_kernels import indexer_logits, indexer_topk, select_topk

    shape, operands = _mosaic_logits.arguments(queries, keys, forced)
    assert queries.page_table is not None
    own, table = shape.queries == 1, queries.page_table
    conversion: select_topk.PagedSlots | None = None
    given: dict[str, Array] = {}
    if slots:
        conversion = select_topk.PagedSlots(
            page_size=shape.keys.page_size,
            requests=table.shape[0],
            max_pages=table.shape[1],
            own_request=own,
        )
        given["page_table"] = table
        if not own:
            given["requests"] = jnp.repeat(
                jnp.arange(shape.requests, dtype=jnp.int32), shape.queries
            )
    if indexer_topk.pays(shape) if joined is None else joined:
        chosen = indexer_topk.indexer_topk(shape, operands, k, conversion=conversion)
    else:
        chosen = select_topk.select_topk(
            indexer_logits.indexer_logits(shape, operands),
            operands["ends"],
            k,
            conversion=conversion,
            operands=given,
        )
    return chosen.reshape(shape.requests, shape.queries, k)
