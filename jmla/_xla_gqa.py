"""Grouped-query decode through XLA: gather, dequantise, two matrix products, in bounded memory.

As in `jmla._xla_attention`, a step takes a fixed number of requests and of keys, whatever the
batch, so that a request has the same bits in every batch.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from jmla._running_softmax import RunningSoftmax, finite_top
from jmla._xla_attention import (
    CPU_DECODE_ROWS_PER_STEP,
    DECODE_ROWS_PER_STEP,
    KEYS_PER_STEP,
)
from jmla.layouts.key_values import KeyValueRows
from jmla.reference import causal_lengths

_Results = tuple[BFloat16[Array, "b s_q h dim"], Float[Array, "b s_q h"]]


@functools.partial(jax.jit, static_argnames=("causal", "num_splits"))
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
    """`jmla.gqa_decode` of arguments that it has checked."""
    loop = functools.partial(_attend_loop, causal=causal, num_splits=num_splits or 1)
    return lax.platform_dependent(
        q,
        rows,
        page_table,
        seq_lens,
        jnp.asarray(sm_scale, jnp.float32),
        cpu=functools.partial(loop, requests_per_step=CPU_DECODE_ROWS_PER_STEP),
        default=functools.partial(loop, requests_per_step=DECODE_ROWS_PER_STEP),
    )


def _attend_loop(
    q: BFloat16[Array, "b s_q h dim"],
    rows: KeyValueRows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    scale: Float[Array, ""],
    *,
    causal: bool,
    num_splits: int,
    requests_per_step: int,
) -> _Results:
    b, s_q, heads, dim = q.shape
    padding = -b % requests_per_step
    group = heads // rows.kv_heads

    def in_steps(x: Array, fill: int) -> Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(-1, requests_per_step, *x.shape[1:])

    by_head = q.reshape(b, s_q, rows.kv_heads, group, dim).swapaxes(1, 2)
    lengths = causal_lengths(seq_lens, s_q, causal).repeat(group, axis=1)
    attend = functools.partial(_attend_step, rows, scale, num_splits)
    out, lse = lax.map(
        attend,
        (
            in_steps(by_head.reshape(b, rows.kv_heads, s_q * group, dim), 0),
            in_steps(page_table, -1),
            in_steps(lengths, 0),
        ),
    )

    def by_token(x: Array) -> Array:
        x = x.reshape(b + padding, rows.kv_heads, s_q, group, *x.shape[4:])[:b]
        return x.swapaxes(1, 2).reshape(b, s_q, heads, *x.shape[4:])

    return by_token(out).astype(q.dtype), by_token(lse)


def _attend_step(
    rows: KeyValueRows,
    scale: Float[Array, ""],
    num_splits: int,
    operands: tuple[BFloat16[Array, "c kv r dim"], Int[Array, "c max_pages"], Int[Array, "c r"]],
) -> tuple[Float[Array, "c kv r dim"], Float[Array, "c kv r"]]:
    q, pages, lengths = operands
    num_keys = pages.shape[1] * rows.shape[1]
    blocks = max(math.ceil(num_keys / KEYS_PER_STEP), min(num_splits, num_keys))
    size = math.ceil(num_keys / blocks)
    attend = functools.partial(_attend_block, rows, scale, size, q, pages, lengths)

    def join(softmax: RunningSoftmax, start: Int[Array, ""]) -> tuple[RunningSoftmax, None]:
        return softmax.joined_with(attend(start)), None

    starts = jnp.arange(1, blocks, dtype=jnp.int32) * size
    softmax, _ = lax.scan(join, attend(jnp.int32(0)), starts)
    empty = softmax.total == 0.0
    out = jnp.where(empty[..., None], 0.0, softmax.out / softmax.total[..., None])
    return out, jnp.where(empty, -jnp.inf, softmax.top + jnp.log(softmax.total))


def _attend_block(
    rows: KeyValueRows,
    scale: Float[Array, ""],
    size: int,
    q: BFloat16[Array, "c kv r dim"],
    pages: Int[Array, "c max_pages"],
    lengths: Int[Array, "c r"],
    start: Int[Array, ""],
) -> RunningSoftmax:
    """The softmax of every row over the positions `start` to `start + size`."""
    num_pages, page_size = rows.shape
    places = start + jnp.arange(size, dtype=jnp.int32)
    page = pages.at[:, places // page_size].get(
        mode="fill", fill_value=-1, wrap_negative_indices=False
    )
    named = (page >= 0) & (page < num_pages)
    named &= places[None, :] < jnp.max(lengths, axis=1, keepdims=True)
    slots = jnp.where(named, page * page_size + (places % page_size)[None, :], -1)
    keys, values = rows.gather(slots).dequantize()
    valid = named[:, None, :] & (places[None, None, :] < lengths[:, :, None])
    logits = jnp.einsum("cvrd,ckvd->cvrk", q, keys, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(valid[:, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - finite_top(top)[..., None])
    out = jnp.einsum(
        "cvrk,ckvd->cvrd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
    )
    return RunningSoftmax(out, top, jnp.sum(weights, axis=-1))
