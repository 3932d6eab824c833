"""The attention ops in plain `jax.numpy`, float32 and unchunked: the definition of correct.

Every other implementation is tested against these functions. They gather all keys at once, so
they are for small inputs. The arguments are those of `jmla.attention`, which checks them and
documents them; here they are taken as valid.

A *row* below is one query token's attention problem. A key takes part in it when its slot is in
range and its place in the row's list is below the row's length. Keys that take no part are zero
rows by the time arithmetic sees them, so that what the cache holds there (it may be NaN) is gone.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jmla.layouts.base import Rows, page_slots
from jmla.layouts.key_values import KeyValueRows


@jax.jit
def sparse_decode(
    q: Float[Array, "b s_q h width"],
    rows: Rows,
    indices: Int[Array, "b s_q topk"],
    *,
    sm_scale: float | Float[Array, ""],
    topk_length: Int[Array, "..."] | None = None,
    attn_sink: Float[Array, " h"] | None = None,
    extra_rows: Rows | None = None,
    extra_indices: Int[Array, "b s_q extra_topk"] | None = None,
    extra_topk_length: Int[Array, "..."] | None = None,
) -> tuple[Float[Array, "b s_q h value"], Float[Array, "b s_q h"]]:
    """Attention of decode queries to the slots in `indices` (and `extra_indices`): out, lse."""
    keys, valid = _gather(rows, indices, topk_length)
    if extra_rows is not None and extra_indices is not None:
        extra_keys, extra_valid = _gather(extra_rows, extra_indices, extra_topk_length)
        keys = jnp.concatenate([keys, extra_keys], axis=-2)
        valid = jnp.concatenate([valid, extra_valid], axis=-1)
    out, _, lse = _attend(q, keys, valid, sm_scale, attn_sink, rows.value_dim)
    return out, lse


@jax.jit
def sparse_prefill(
    q: Float[Array, "t h width"],
    rows: Rows,
    indices: Int[Array, "t topk"],
    *,
    sm_scale: float | Float[Array, ""],
    topk_length: Int[Array, " t"] | None = None,
    attn_sink: Float[Array, " h"] | None = None,
) -> tuple[Float[Array, "t h value"], Float[Array, "t h"], Float[Array, "t h"]]:
    """Attention of prompt tokens to the slots in `indices`: out, max_logits, lse."""
    keys, valid = _gather(rows, indices, topk_length)
    return _attend(q, keys, valid, sm_scale, attn_sink, rows.value_dim)


@functools.partial(jax.jit, static_argnames=("causal", "window"))
def dense_decode(
    q: Float[Array, "b s_q h width"],
    rows: Rows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool = True,
    window: int | None = None,
) -> tuple[Float[Array, "b s_q h value"], Float[Array, "b s_q h"]]:
    """Attention of each request's last `s_q` tokens to all its positions: out, lse."""
    num_pages, page_size = rows.shape
    in_table = (page_table >= 0) & (page_table < num_pages)
    offsets = jnp.arange(page_size, dtype=jnp.int32)
    slots = jnp.where(in_table, page_table, 0)[:, :, None] * page_size + offsets[None, None, :]
    slots = jnp.where(in_table[:, :, None], slots, -1)
    slots = slots.reshape(len(page_table), page_table.shape[1] * page_size)
    keys, valid = _gather(rows, slots, seq_lens)
    lengths = causal_lengths(seq_lens, q.shape[1], causal)
    positions = jnp.arange(slots.shape[1], dtype=jnp.int32)
    valid = valid[:, None, :] & (positions[None, None, :] < lengths[:, :, None])
    if window is not None:
        valid &= positions[None, None, :] >= lengths[:, :, None] - window
    out, _, lse = _attend(q, keys[:, None], valid, sm_scale, None, rows.value_dim)
    return out, lse


@functools.partial(jax.jit, static_argnames=("causal",))
def gqa_decode(
    q: Float[Array, "b s_q h dim"],
    rows: KeyValueRows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool = True,
) -> tuple[Float[Array, "b s_q h dim"], Float[Array, "b s_q h"]]:
    """Grouped-query attention of each request's last `s_q` tokens to all its positions."""
    b, s_q, heads, dim = q.shape
    slots = page_slots(page_table, *rows.shape).reshape(b, -1)
    positions = jnp.arange(slots.shape[1], dtype=jnp.int32)
    slots = jnp.where(positions[None, :] < seq_lens[:, None], slots, -1)
    keys, values = (x.astype(jnp.float32) for x in rows.flat().gather(slots).dequantize())
    lengths = causal_lengths(seq_lens, s_q, causal)
    valid = (slots >= 0)[:, None, :] & (positions[None, None, :] < lengths[:, :, None])
    exact = jax.lax.Precision.HIGHEST
    grouped = q.reshape(b, s_q, rows.kv_heads, heads // rows.kv_heads, dim).astype(jnp.float32)
    logits = jnp.einsum("bsvgd,bkvd->bsvgk", grouped, keys, precision=exact)
    logits = logits * jnp.asarray(sm_scale, jnp.float32)
    logits = jnp.where(valid[:, :, None, None, :], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(logits - top[..., None])
    out = jnp.einsum("bsvgk,bkvd->bsvgd", weights, values, precision=exact)
    out, lse = _normalise(out, top, jnp.sum(weights, axis=-1), q.dtype)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


@jax.jit
def merge(
    outs: Float[Array, "n *rows h value"], lses: Float[Array, "n *rows h"]
) -> tuple[Float[Array, "*rows h value"], Float[Array, "*rows h"]]:
    """Attention over a union of disjoint key sets, from the out and lse over each set."""
    empty = jnp.isinf(lses)
    top = jnp.max(jnp.where(empty, -jnp.inf, lses), axis=0)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.where(empty, 0.0, jnp.exp(lses - top[None]))
    total = jnp.sum(weights, axis=0)
    # An empty set's out is anything, so it is replaced and not multiplied by zero.
    parts = jnp.where(empty[..., None], 0.0, outs.astype(jnp.float32)) * weights[..., None]
    return _normalise(jnp.sum(parts, axis=0), top, total, outs.dtype)


def causal_lengths(seq_lens: Int[Array, " b"], s_q: int, causal: bool) -> Int[Array, "b s_q"]:
    """How many of a request's positions each of its last `s_q` tokens may attend to."""
    behind = jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32) if causal else jnp.zeros(s_q, jnp.int32)
    return jnp.maximum(seq_lens, 0)[:, None] - behind[None, :]


def apply_sink(
    out: Float[Array, "*rows h value"], lse: Float[Array, "*rows h"], sink: Float[Array, " h"]
) -> Float[Array, "*rows h value"]:
    """`out` with a key of logit `sink` and value zero joined to every row; +-inf is legal."""
    sink = sink.reshape((1,) * (lse.ndim - 1) + sink.shape)
    kept = 1.0 / (1.0 + jnp.exp(sink - lse))
    # sink - lse is NaN where both are -inf: an empty row, whose out is zero with any sink.
    return out * jnp.where(jnp.isneginf(lse), 0.0, kept)[..., None]


def _gather(
    rows: Rows, indices: Int[Array, "*rows k"], lengths: Int[Array, "..."] | None
) -> tuple[Float[Array, "*rows k width"], Bool[Array, "*rows k"]]:
    """The bf16 keys that `indices` name, widened to f32, and which of them take part."""
    valid = (indices >= 0) & (indices < rows.num_slots)
    if lengths is not None:
        lengths = lengths.reshape(lengths.shape + (1,) * (indices.ndim - lengths.ndim))
        places = jnp.arange(indices.shape[-1], dtype=jnp.int32)
        places = places.reshape((1,) * (indices.ndim - 1) + places.shape)
        valid &= places < lengths
    keys = rows.flat().gather(jnp.where(valid, indices, -1)).dequantize()
    return keys.astype(jnp.float32), valid


def _attend(
    q: Float[Array, "*rows h width"],
    keys: Float[Array, "*rows k width"],
    valid: Bool[Array, "*rows k"],
    sm_scale: float | Float[Array, ""],
    sink: Float[Array, " h"] | None,
    value_dim: int,
) -> tuple[Float[Array, "*rows h value"], Float[Array, "*rows h"], Float[Array, "*rows h"]]:
    """Softmax attention: out in q's dtype, the largest logit, lse."""
    scale = jnp.asarray(sm_scale, jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("...hw,...kw->...hk", q.astype(jnp.float32), keys, precision=exact) * scale
    logits = jnp.where(valid[..., None, :], logits, -jnp.inf)
    max_logits = jnp.max(logits, axis=-1)
    top = jnp.where(jnp.isneginf(max_logits), 0.0, max_logits)
    weights = jnp.exp(logits - top[..., None])
    values = keys[..., :value_dim]
    out = jnp.einsum("...hk,...kv->...hv", weights, values, precision=exact)
    out, lse = _normalise(out, top, jnp.sum(weights, axis=-1), jnp.float32)
    if sink is not None:
        out = apply_sink(out, lse, sink)
    return out.astype(q.dtype), max_logits, lse


def _normalise(
    out: Float[Array, "*rows h value"],
    top: Float[Array, "*rows h"],
    total: Float[Array, "*rows h"],
    dtype: DTypeLike,
) -> tuple[Float[Array, "*rows h value"], Float[Array, "*rows h"]]:
    """Divide by the sum of weights; nothing to attend gives out 0 and lse -inf."""
    empty = total == 0.0
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    out = jnp.where(empty[..., None], 0.0, out / total[..., None])
    return out.astype(dtype), lse
