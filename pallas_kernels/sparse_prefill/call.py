"""The launch, or that of the decode kernel where its blocks are the faster ones."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.device.row_formats import RANK
from pallas_kernels.sparse_decode.call import KeyList, sparse_decode
from pallas_kernels.sparse_decode.program import Program, launch
from pallas_kernels.sparse_decode.tuning import Shape
from pallas_kernels.sparse_prefill.block import Block, blocks_of, shared_bytes
from pallas_kernels.sparse_prefill.scores import scores
from pallas_kernels.sparse_prefill.tuning import (
    HEADS,
    SCORES_REGISTERS,
    VALUES_REGISTERS,
    is_for_own_blocks,
)
from pallas_kernels.sparse_prefill.values import values


def _program() -> Program:
    """Blocks of 64 heads that take one task after another."""
    return Program(
        HEADS,
        shared_bytes(),
        Block,
        [
            (SCORES_REGISTERS, functools.partial(scores, group=0)),
            (SCORES_REGISTERS, functools.partial(scores, group=1)),
            (VALUES_REGISTERS, functools.partial(values, half=0)),
            (VALUES_REGISTERS, functools.partial(values, half=1)),
        ],
    )


def sparse_prefill(
    q: BFloat16[Array, "n h width"],
    keys: KeyList,
    *,
    sm_scale: float | Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
) -> tuple[BFloat16[Array, "n h 512"], Float[Array, "n h"], Float[Array, "n h"]]:
    """Attention of `n` queries to the rows that each of them names.

    Args:
        q: bf16 [n, h, width], of the rows' format; n and h at least 1.
        keys: of the queries, in a cache of at least one row.
        sm_scale: factor on the logits.
        attn_sink: f32 [h], the logit of a key of value zero, or None.

    Returns:
        out, bf16 [n, h, 512]; max_logits, f32 [n, h]; lse, f32 [n, h], natural and without the
        sink.
    """
    n, heads, _ = q.shape
    if not is_for_own_blocks(keys.format, n, heads):
        done = sparse_decode(
            q, [keys], sm_scale=sm_scale, attn_sink=attn_sink, num_splits=None, with_max_logits=True
        )
        assert done.max_logits is not None
        return done.out, done.max_logits, done.lse
    shape = Shape(
        n=n,
        heads=heads,
        topk=keys.indices.shape[1],
        num_slots=keys.num_slots,
        splits=1,
        final=True,
        has_lengths=keys.lengths is not None,
        has_sink=attn_sink is not None,
        has_scale=False,
        has_max_logits=True,
        pages=None,
    )
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    operands = {"q": q, "indices": keys.indices, "sm_scale": scale, **keys.arrays}
    if keys.lengths is not None:
        operands["lengths"] = keys.lengths
    if attn_sink is not None:
        operands["sink"] = attn_sink
    results = launch(
        _program(),
        shape,
        operands,
        {
            "out": jax.ShapeDtypeStruct((n, heads, RANK), jnp.bfloat16),
            "max_logits": jax.ShapeDtypeStruct((n, heads), jnp.float32),
            "lse": jax.ShapeDtypeStruct((n, heads), jnp.float32),
        },
        blocks=blocks_of(shape),
    )
    return results["out"], results["max_logits"], results["lse"]
