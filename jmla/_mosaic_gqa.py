"""Grouped-query decode through the Hopper kernel of `pallas_kernels`: what it serves, the call."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla import _xla_gqa
from jmla._mosaic_decode import batchable
from jmla._mosaic_dense import MAX_POSITIONS
from jmla.layouts.key_values import FP8KeyValues, KeyValueRows

HEAD_DIMS = (64, 128)
FORMATS = (("bfloat16", "bf16"), ("fp8_e4m3", "fp8"), ("fp4_e2m1", "fp4"))


class Requests(NamedTuple):
    """What each of `b` requests has of its own.

    Attributes:
        q: bf16 [b, s_q, h, head_dim].
        page_table: int32 [b, max_pages].
        seq_lens: int32 [b].
    """

    q: BFloat16[Array, "b s_q h dim"]
    page_table: Int[Array, "b max_pages"]
    seq_lens: Int[Array, " b"]


class Shared(NamedTuple):
    """What all requests share: the cache, of token shape (pages, page_size), and the factor."""

    rows: KeyValueRows
    sm_scale: Float[Array, ""]


class Options(NamedTuple):
    """What a kernel is compiled for, beside shapes."""

    causal: bool
    num_splits: int | None


_Results = tuple[BFloat16[Array, "b s_q h dim"], Float[Array, "b s_q h"]]


def unsupported_reasons(
    q: BFloat16[Array, "b s_q h dim"], rows: KeyValueRows, page_table: Int[Array, "b max_pages"]
) -> list[str]:
    """Why the kernel cannot serve a call; empty if it can."""
    reasons = head_dim_reasons(rows.head_dim)
    if 0 in q.shape:
        reasons.append(f"{q.shape=}: the mosaic_gpu kernel expects at least one query")
    if rows.num_slots == 0:
        reasons.append(f"the mosaic_gpu kernel expects at least one slot: {rows.shape=}")
    positions = page_table.shape[1] * rows.shape[1]
    if positions > MAX_POSITIONS:
        reasons.append(
            f"{page_table.shape=}: the mosaic_gpu kernel expects at most {MAX_POSITIONS} positions "
            f"of a request, and pages of {rows.shape[1]} make {positions}"
        )
    return reasons


def head_dim_reasons(head_dim: int) -> list[str]:
    """Why the kernel cannot read a cache with heads of this many values; empty if it can."""
    if head_dim in HEAD_DIMS:
        return []
    return [f"the mosaic_gpu kernel reads heads of 64 or 128 values only, and {head_dim=}"]


def gqa_decode(
    q: BFloat16[Array, "b s_q h dim"],
    rows: KeyValueRows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool,
    num_splits: int | None,
) -> _Results:
    """`jmla.gqa_decode` of arguments that `unsupported_reasons` has nothing against.

    vmap over the arguments of the requests alone (q, page_table, seq_lens) makes them one larger
    batch; over any other argument it runs the kernel once for each element. Derivatives are
    computed by XLA, which repeats the attention for them.
    """
    shared = Shared(rows, jnp.asarray(sm_scale, jnp.float32))
    return _compiled(Requests(q, page_table, seq_lens), shared, Options(causal, num_splits))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _attend(requests: Requests, shared: Shared, options: Options) -> _Results:
    return batchable(functools.partial(_launch, options))(requests, shared)


@_attend.defjvp
def _with_derivatives_of_xla(
    options: Options, primals: tuple[Requests, Shared], tangents: tuple[Any, Any]
) -> tuple[_Results, _Results]:
    _, moved = jax.jvp(functools.partial(_by_xla, options), primals, tangents)
    return _attend(*primals, options), moved


def _by_xla(options: Options, requests: Requests, shared: Shared) -> _Results:
    return _xla_gqa.gqa_decode(
        requests.q,
        shared.rows,
        requests.page_table,
        requests.seq_lens,
        sm_scale=shared.sm_scale,
        causal=options.causal,
        num_splits=options.num_splits,
    )


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_attend, static_argnums=2)


def _launch(options: Options, requests: Requests, shared: Shared) -> _Results:
    from pallas_kernels import gqa_decode as kernels

    return kernels.gqa_decode(
        requests.q,
        kernels.HeadPages(
            format=dict(FORMATS)[shared.rows.kv_cache_dtype],
            arrays=arrays_of(shared.rows),
            table=requests.page_table,
            lengths=requests.seq_lens,
        ),
        sm_scale=shared.sm_scale,
        causal=options.causal,
        num_splits=options.num_splits,
    )


def arrays_of(rows: KeyValueRows) -> dict[str, Array]:
    """The cache as the kernel names its arrays."""
    arrays = {name: getattr(rows, name) for name in rows.token_leaves}
    if isinstance(rows, FP8KeyValues):
        for name in ("key_scale", "value_scale"):
            scale = getattr(rows, name)
            arrays[name] = jnp.ones(1) if scale is None else scale.reshape(1)
    return arrays
