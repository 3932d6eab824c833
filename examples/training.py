"""Losses of the published recipe for sparse attention (DeepSeek-V3.2-Exp, section 2.1.2).

Dense: the language model alone, attending to everything. Warm-up: the model is frozen and its
indexer learns the attention distribution. Sparse: each query attends to the indexer's choice; the
indexer goes on learning the distribution over what it chose, the model the text. An own last step
rounds some sequences' latents as an FP4 cache would, so that the model bears it.

Training expands keys and values per head (cheaper than the latent space while every key is read);
`jmla.model` shares every projection, so the weights serve unchanged.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from examples.byte_lm import ByteLMConfig, Params, mlp, read_out
from jmla import KVLayout, dequantize, quantize
from jmla.model import Projections, project, rms_norm

Stage = Literal["dense", "warmup", "sparse"]
DenseAttention = Literal["cudnn", "xla"]
LatentPart = Literal["row", "nope", "rope"]


def losses(
    params: Params,
    config: ByteLMConfig,
    tokens: Int[Array, "b t"],
    *,
    stage: Stage,
    attention: DenseAttention,
    fp4_sequences: int = 0,
    fp4_part: LatentPart = "row",
    query_chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy of the next byte and mean indexer divergence, summed over layers; nats.

    Args:
        params: bf16 or f32.
        config: the sizes.
        tokens: `[batch, context + 1]` bytes; the last is only predicted.
        stage: which part of the recipe; "dense" has no indexer divergence (0).
        attention: implementation of dense attention.
        fp4_sequences: how many of the batch attend to latents that went through an FP4 cache.
        fp4_part: which part of those latents is rounded.
        query_chunk: queries handled at once where probabilities are needed; divides context.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, length = inputs.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    x = params["embed"][inputs.reshape(-1)]
    divergence = jnp.zeros((), jnp.float32)

    def layer_step(layer: Params, x: Array) -> tuple[Array, Array]:
        normed = rms_norm(x, layer["attention_norm"], config.mla.norm_eps)
        projected = project(layer["attention"], config.mla, normed, positions)
        if fp4_sequences:
            stored, kept = jnp.split(projected.latents, [fp4_sequences * length])
            stored = _through_fp4(stored, config.mla.kv_lora_rank, fp4_part)
            projected = replace(projected, latents=jnp.concatenate([stored, kept]))
        q, k, v = _expand(layer["attention"], config, projected, (batch, length))
        if stage == "dense":
            out = _dense_attention(q, k, v, config, attention)
            kl = jnp.zeros((), jnp.float32)
        else:
            indexer = jax.tree.map(
                lambda a: a.reshape(batch, length, *a.shape[1:]), projected.indexer
            )
            attend = partial(
                _attention_with_divergence, config=config, stage=stage, query_chunk=query_chunk
            )
            out, kl = jax.lax.map(lambda s: attend(*s), (q, k, v, indexer))
            kl = jnp.mean(kl)
        out = out.reshape(batch * length, *out.shape[2:])
        x = x + jnp.einsum("thv,hvd->td", out, layer["attention"]["out"])
        return x + mlp(layer, config, x), kl

    for layer in params["layers"]:
        x, kl = layer_step(layer, x)
        divergence += kl
    logits = read_out(params, config, x)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(
        log_probabilities, targets.reshape(-1, 1).astype(jnp.int32), axis=1
    )
    return -jnp.mean(chosen), divergence


def _through_fp4(
    latents: Float[Array, "t dl"], rank: int, part: LatentPart
) -> Float[Array, "t dl"]:
    """What an FP4 cache gives back; the gradient passes as if it were exact."""
    rows = quantize(jax.lax.stop_gradient(latents), KVLayout.FP4, rank=rank)
    rounded = dequantize(rows).astype(latents.dtype)
    if part != "row":
        is_nope = jnp.arange(latents.shape[1]) < rank
        rounded = jnp.where(is_nope[None] == (part == "nope"), rounded, latents)
    return latents + jax.lax.stop_gradient(rounded - latents)


def _expand(
    attention: Params, config: ByteLMConfig, projected: Projections, shape: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Per-head queries, keys `[b, t, h, nope + rope]` and values `[b, t, h, v]`."""
    nope, rope = jnp.split(projected.latents, [config.mla.kv_lora_rank], axis=-1)
    k_nope = jnp.einsum("tr,hdr->thd", nope, attention["k_up"])
    k_rope = jnp.broadcast_to(rope[:, None], (*k_nope.shape[:2], rope.shape[-1]))
    q = jnp.concatenate([projected.query_nope, projected.query_rope], axis=-1)
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    v = jnp.einsum("tr,hrv->thv", nope, attention["v_up"])
    return (
        q.reshape(*shape, *q.shape[1:]),
        k.reshape(*shape, *k.shape[1:]),
        v.reshape(*shape, *v.shape[1:]),
    )


def _dense_attention(
    q: Array, k: Array, v: Array, config: ByteLMConfig, implementation: DenseAttention
) -> Array:
    # cuDNN wants values as wide as keys.
    padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - v.shape[-1])))
    out = jax.nn.dot_product_attention(
        q, k, padded, scale=config.mla.sm_scale, is_causal=True, implementation=implementation
    )
    return out[..., : v.shape[-1]]


def _attention_with_divergence(
    q: Float[Array, "t h d"],
    k: Float[Array, "t h d"],
    v: Float[Array, "t h v"],
    indexer,
    *,
    config: ByteLMConfig,
    stage: Stage,
    query_chunk: int,
) -> tuple[Float[Array, "t h v"], Float[Array, ""]]:
    """Attention of one sequence and the mean divergence of its indexer, in chunks of queries."""
    length = q.shape[0]
    if length % query_chunk:
        raise ValueError(f"{length=}: expected a multiple of {query_chunk=}.")

    # Probabilities are recomputed in the backward pass; the sort behind top-k is not.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("threshold"))
    def chunk(_, start: Array):
        def rows(a: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, start, query_chunk)

        visible = jnp.arange(length)[None] <= (start + jnp.arange(query_chunk))[:, None]
        dots = jnp.einsum(
            "thd,sd->hts", rows(indexer.queries), indexer.keys, preferred_element_type=jnp.float32
        )
        index_logits = jnp.einsum("hts,th->ts", jax.nn.relu(dots), rows(indexer.weights))
        index_logits = jnp.where(visible, index_logits, -jnp.inf)
        if stage == "sparse" and config.mla.index_topk < length:
            best = jax.lax.top_k(jax.lax.stop_gradient(index_logits), config.mla.index_topk)[0]
            threshold = checkpoint_name(best[:, -1:], "threshold")
            visible = visible & (index_logits >= threshold)
        scores = jnp.einsum("thd,shd->hts", rows(q), k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[None], scores * config.mla.sm_scale, -jnp.inf)
        probabilities = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("hts,shv->thv", probabilities.astype(v.dtype), v)
        target = jax.lax.stop_gradient(jnp.mean(probabilities, axis=0))
        predicted = jax.nn.log_softmax(jnp.where(visible, index_logits, -jnp.inf), axis=-1)
        predicted = jnp.where(visible, predicted, 0.0)
        kl = jnp.sum(jax.scipy.special.xlogy(target, target) - target * predicted)
        return None, (out, kl)

    starts = jnp.arange(0, length, query_chunk)
    _, (out, kl) = jax.lax.scan(chunk, None, starts)
    return out.reshape(length, *out.shape[2:]), jnp.sum(kl) / length
