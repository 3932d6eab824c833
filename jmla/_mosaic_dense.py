"""Dense decode through the Hopper kernel of `pallas_kernels`: what it serves, and the call."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla import _mosaic_decode as sparse
from jmla import _xla_attention
from jmla.layouts.base import Rows

MAX_POSITIONS = 2**31 - 2**10  # of a table: positions are counted in 32 bits


class Requests(NamedTuple):
    """What each of `b` requests has of its own.

    Attributes:
        q: bf16 [b, s_q, h, width].
        page_table: int32 [b, max_pages].
        seq_lens: int32 [b].
    """

    q: BFloat16[Array, "b s_q h width"]
    page_table: Int[Array, "b max_pages"]
    seq_lens: Int[Array, " b"]


class Shared(NamedTuple):
    """What all requests share: the cache, of token shape (pages, page_size), and the factor."""

    rows: Rows
    sm_scale: Float[Array, ""]


class Options(NamedTuple):
    """What a kernel is compiled for, beside shapes."""

    causal: bool
    window: int | None
    num_splits: int | None


_Results = tuple[BFloat16[Array, "b s_q h value"], Float[Array, "b s_q h"]]


def unsupported_reasons(
    q: BFloat16[Array, "b s_q h width"], rows: Rows, page_table: Int[Array, "b max_pages"]
) -> list[str]:
    """Why the kernel cannot serve a call; empty if it can."""
    reasons = sparse.unsupported_reasons(q, rows, None)
    positions = page_table.shape[1] * rows.shape[1]
    if positions > MAX_POSITIONS:
        reasons.append(
            f"{page_table.shape=}: the mosaic_gpu kernel expects at most {MAX_POSITIONS} positions "
            f"of a request, and pages of {rows.shape[1]} make {positions}"
        )
    return reasons


def dense_decode(
    q: BFloat16[Array, "b s_q h width"],
    rows: Rows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool,
    window: int | None,
    num_splits: int | None,
) -> _Results:
    """`jmla.dense_decode` of arguments that `unsupported_reasons` has nothing against.

    vmap over the arguments of the requests alone (q, page_table, seq_lens) makes them one larger
    batch; over any other argument it runs the kernel once for each element. Derivatives are
    computed by XLA, which repeats the attention for them.
    """
    shared = Shared(rows, jnp.asarray(sm_scale, jnp.float32))
    return _compiled(Requests(q, page_table, seq_lens), shared, Options(causal, window, num_splits))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _attend(requests: Requests, shared: Shared, options: Options) -> _Results:
    return sparse.batchable(functools.partial(_launch, options))(requests, shared)


@_attend.defjvp
def _with_derivatives_of_xla(
    options: Options, primals: tuple[Requests, Shared], tangents: tuple[Any, Any]
) -> tuple[_Results, _Results]:
    _, moved = jax.jvp(functools.partial(_by_xla, options), primals, tangents)
    return _attend(*primals, options), moved


def _by_xla(options: Options, requests: Requests, shared: Shared) -> _Results:
    return _xla_attention.dense_decode(
        requests.q,
        shared.rows,
        requests.page_table,
        requests.seq_lens,
        sm_scale=shared.sm_scale,
        causal=options.causal,
        window=options.window,
        num_splits=options.num_splits,
    )


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_attend, static_argnums=2)


def _launch(options: Options, requests: Requests, shared: Shared) -> _Results:
    from pallas_kernels import dense_decode as kernels

    # Under jit: outside of it a reshape copies the cache.
    cache = shared.rows.flat()
    return kernels.dense_decode(
        requests.q,
        kernels.Pages(
            format=sparse.format_name(cache),
            arrays=sparse.arrays_of(cache),
            table=requests.page_table,
            lengths=requests.seq_lens,
            page_size=shared.rows.shape[1],
        ),
        sm_scale=shared.sm_scale,
        causal=options.causal,
        window=options.window,
        num_splits=options.num_splits,
    )
