"""Sparse prefill through the Hopper kernels of `pallas_kernels`: the call.

What they serve is what those of decode do: `jmla._mosaic_decode.unsupported_reasons`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla import _xla_attention, _xla_prefill
from jmla._mosaic_decode import Queries, Shared, batchable, key_lists
from jmla.layouts.base import Rows

_Results = tuple[BFloat16[Array, "t h value"], Float[Array, "t h"], Float[Array, "t h"]]


def sparse_prefill(
    q: BFloat16[Array, "t h width"],
    rows: Rows,
    indices: Int[Array, "t topk"],
    *,
    sm_scale: float | Float[Array, ""],
    topk_length: Int[Array, " t"] | None,
    attn_sink: Float[Array, " h"] | None,
) -> _Results:
    """`jmla.sparse_prefill` of arguments that `unsupported_reasons` has nothing against.

    vmap and derivatives are as in `jmla._mosaic_decode.sparse_decode`.
    """
    queries = Queries(q, (indices,), (topk_length,))
    return _compiled(queries, Shared((rows,), jnp.asarray(sm_scale, jnp.float32), attn_sink))


@jax.custom_jvp
def _attend(queries: Queries, shared: Shared) -> _Results:
    return batchable(_launch)(queries, shared)


@_attend.defjvp
def _with_derivatives_of_xla(
    primals: tuple[Queries, Shared], tangents: tuple[Any, Any]
) -> tuple[_Results, _Results]:
    _, moved = jax.jvp(_by_xla, primals, tangents)
    return _attend(*primals), moved


def _by_xla(queries: Queries, shared: Shared) -> _Results:
    slots = _xla_attention.slot_list(shared.caches[0], queries.indices[0], queries.lengths[0])
    return _xla_prefill.prefill(
        queries.q, slots, sm_scale=shared.sm_scale, attn_sink=shared.attn_sink
    )


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_attend)


def _launch(queries: Queries, shared: Shared) -> _Results:
    from pallas_kernels import sparse_prefill as kernels

    (keys,) = key_lists(queries, shared)
    return kernels.sparse_prefill(
        queries.q, keys, sm_scale=shared.sm_scale, attn_sink=shared.attn_sink
    )
