"""The launch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.device.row_formats import RANK
from pallas_kernels.sparse_decode.program import Program, launch
from pallas_kernels.sparse_decode.tuning import Shape
from pallas_kernels.sparse_prefill.block import Block, blocks_of, shared_bytes
from pallas_kernels.sparse_prefill.gather import gather
from pallas_kernels.sparse_prefill.scores import scores
from pallas_kernels.sparse_prefill.tuning import HEADS, TUNING, Tuning
from pallas_kernels.sparse_prefill.values import values


def program(tuning: Tuning) -> Program:
    """Blocks of 64 heads that take one task after another."""
    for_scores, for_values, for_gather = tuning.registers
    return Program(
        HEADS,
        shared_bytes(tuning),
        functools.partial(Block, tuning),
        [
            (for_scores, scores),
            (for_values, functools.partial(values, half=0)),
            (for_values, functools.partial(values, half=1)),
            (for_gather, gather),
        ],
    )


def sparse_prefill(
    q: BFloat16[Array, "n h 576"],
    latents: BFloat16[Array, "slots 576"],
    indices: Int[Array, "n topk"],
    lengths: Int[Array, " n"] | None,
    *,
    sm_scale: float | Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
) -> tuple[BFloat16[Array, "n h 512"], Float[Array, "n h"], Float[Array, "n h"]]:
    """Attention of `n` queries to the rows that each of them names.

    Args:
        q: bf16 [n, h, 576]; n and h at least 1.
        latents: the cache; at least one row.
        indices: int32 [n, topk], slots; any slot outside the cache is masked.
        lengths: int32 [n], how many of a query's slots count, or None for all.
        sm_scale: factor on the logits.
        attn_sink: f32 [h], the logit of a key of value zero, or None.

    Returns:
        out, bf16 [n, h, 512]; max_logits, f32 [n, h]; lse, f32 [n, h], natural and without the
        sink.
    """
    n, heads, _ = q.shape
    shape = Shape(
        n=n,
        heads=heads,
        topk=indices.shape[1],
        num_slots=latents.shape[0],
        splits=1,
        final=True,
        has_lengths=lengths is not None,
        has_sink=attn_sink is not None,
        has_scale=False,
        pages=None,
    )
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    operands = {"q": q, "latents": latents, "indices": indices, "sm_scale": scale}
    if lengths is not None:
        operands["lengths"] = lengths
    if attn_sink is not None:
        operands["sink"] = attn_sink
    results = launch(
        program(TUNING),
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
