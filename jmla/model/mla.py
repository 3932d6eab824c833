"""One MLA layer's projections: hidden states to latents, queries and indexer inputs, and back.

Attention itself happens between `project` and `project_output`, in the latent space: keys are never
expanded per head. `absorbed_query` folds the key expansion into the query, `project_output` folds
the value expansion into the output (DeepSeek-V2, section 2.1).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jmla.index_query import RawIndexQueries
from jmla.model.config import MLAConfig
from jmla.norm import layer_norm, rms_norm
from jmla.raw_latents import RawLatents
from jmla.rope import cos_sin, rotate

MLAParams = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IndexerInputs:
    """What the lightning indexer needs of each token.

    Attributes:
        queries: `[tokens, index_n_heads, index_head_dim]`, rotated by position.
        weights: f32 `[tokens, index_n_heads]`, both scale factors of the logits folded in.
        keys: `[tokens, index_head_dim]`, normalised and rotated by position.
        raw_queries: queries before they are rotated, with what one kernel needs to make them ready;
            None where there are none.
    """

    queries: Float[Array, "t hi di"]
    weights: Float[Array, "t hi"]
    keys: Float[Array, "t di"]
    raw_queries: RawIndexQueries | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projections:
    """One layer's view of its tokens.

    Attributes:
        query_nope: `[tokens, num_heads, qk_nope_head_dim]`, before absorption.
        query_rope: `[tokens, num_heads, qk_rope_head_dim]`, rotated.
        latents: `[tokens, kv_lora_rank + qk_rope_head_dim]`, what the cache stores.
        raw_latents: the same before norm and rotation, for an append that does both.
        indexer: the indexer's inputs; None for a model without one.
    """

    query_nope: Float[Array, "t h dn"]
    query_rope: Float[Array, "t h dr"]
    latents: Float[Array, "t dl"]
    raw_latents: RawLatents
    indexer: IndexerInputs | None


def init_mla(key: PRNGKeyArray, config: MLAConfig, *, dtype=jnp.bfloat16) -> MLAParams:
    """Random parameters of one layer: a flat dict of arrays.

    Matrices are normal with variance 1 / fan-in, gains one, biases zero. Names: `q_down`
    `[hidden, q_lora]`, `q_up` `[q_lora, heads, nope + rope]`, `kv_down` `[hidden, rank + rope]`,
    `k_up` `[heads, nope, rank]`, `v_up` `[heads, rank, v]`, `out` `[heads, v, hidden]`, gains
    `q_norm`, `kv_norm`; with an indexer `index_q` `[q_lora, index_heads, index_dim]`, `index_k`
    `[hidden, index_dim]`, `index_w` `[hidden, index_heads]`, `index_k_gain`, `index_k_bias`.
    """
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "q_down": ((config.hidden_size, config.q_lora_rank), config.hidden_size),
        "q_up": ((config.q_lora_rank, config.num_heads, head_dim), config.q_lora_rank),
        "kv_down": ((config.hidden_size, config.latent_dim), config.hidden_size),
        "k_up": (
            (config.num_heads, config.qk_nope_head_dim, config.kv_lora_rank),
            config.kv_lora_rank,
        ),
        "v_up": ((config.num_heads, config.kv_lora_rank, config.v_head_dim), config.kv_lora_rank),
        "out": (
            (config.num_heads, config.v_head_dim, config.hidden_size),
            config.num_heads * config.v_head_dim,
        ),
    }
    if config.index_n_heads:
        index_shape = (config.q_lora_rank, config.index_n_heads, config.index_head_dim)
        shapes |= {
            "index_q": (index_shape, config.q_lora_rank),
            "index_k": ((config.hidden_size, config.index_head_dim), config.hidden_size),
            "index_w": ((config.hidden_size, config.index_n_heads), config.hidden_size),
        }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: (jax.random.normal(k, shape) * fan_in**-0.5).astype(dtype)
        for k, (name, (shape, fan_in)) in zip(keys, shapes.items(), strict=True)
    }
    params["q_norm"] = jnp.ones((config.q_lora_rank,), dtype)
    params["kv_norm"] = jnp.ones((config.kv_lora_rank,), dtype)
    if config.index_n_heads:
        params["index_k_gain"] = jnp.ones((config.index_head_dim,), dtype)
        params["index_k_bias"] = jnp.zeros((config.index_head_dim,), dtype)
    return params


def project(
    params: MLAParams,
    config: MLAConfig,
    x: Float[Array, "t hidden"],
    positions: Int[Array, " t"],
) -> Projections:
    """Queries, latents and indexer inputs of `x`.

    Args:
        params: as `init_mla` returns them; the dtype of `x` is the dtype of the products.
        config: the sizes.
        x: `[tokens, hidden_size]`, normalised by the caller.
        positions: int32 `[tokens]`, each token's place in its request.
    """
    if x.ndim != 2 or x.shape[1] != config.hidden_size:
        raise ValueError(f"{x.shape=}: expected [tokens, {config.hidden_size}] (hidden_size).")
    q_low = rms_norm(x @ params["q_down"], params["q_norm"], config.norm_eps)
    query = jnp.einsum("tq,qhd->thd", q_low, params["q_up"])
    query_nope, query_rope = jnp.split(query, [config.qk_nope_head_dim], axis=-1)
    kv_low = x @ params["kv_down"]
    nope, rope = jnp.split(kv_low, [config.kv_lora_rank], axis=-1)
    nope = rms_norm(nope, params["kv_norm"], config.norm_eps)
    cos, sin = cos_sin(positions, config.rope, config.qk_rope_head_dim)
    rope = rotate(rope, cos, sin, interleaved=True)
    return Projections(
        query_nope=query_nope,
        query_rope=rotate(query_rope, cos, sin, interleaved=True),
        latents=jnp.concatenate([nope, rope], axis=-1),
        raw_latents=RawLatents(kv_low, params["kv_norm"], cos, sin, eps=config.norm_eps),
        indexer=_indexer_inputs(params, config, x, q_low, positions),
    )


def _indexer_inputs(
    params: MLAParams,
    config: MLAConfig,
    x: Float[Array, "t hidden"],
    q_low: Float[Array, "t q_lora"],
    positions: Int[Array, " t"],
) -> IndexerInputs | None:
    if not config.index_n_heads:
        return None

    # The indexer learns from the attention distribution alone: its loss must not move the model.
    x, q_low = jax.lax.stop_gradient((x, q_low))

    cos, sin = cos_sin(positions, config.rope, config.qk_rope_head_dim)
    interleaved = config.index_rope_interleaved

    def rotate_front(a: Array) -> Array:
        front, back = jnp.split(a, [config.qk_rope_head_dim], axis=-1)
        front = rotate(front, cos, sin, interleaved=interleaved)
        return jnp.concatenate([front, back], axis=-1)

    keys = layer_norm(
        x @ params["index_k"], params["index_k_gain"], params["index_k_bias"], config.norm_eps
    )
    weights = jnp.einsum("td,dh->th", x, params["index_w"], preferred_element_type=jnp.float32)
    weights = weights * (config.index_n_heads * config.index_head_dim) ** -0.5
    raw = RawIndexQueries(
        jnp.einsum("tq,qhd->thd", q_low, params["index_q"]),
        weights,
        cos,
        sin,
        interleaved=interleaved,
    )
    return IndexerInputs(
        queries=raw.rotated(),
        weights=weights,
        keys=rotate_front(keys),
        raw_queries=raw,
    )


def absorbed_query(params: MLAParams, projections: Projections) -> Float[Array, "t h dl"]:
    """Queries in the latent space, bf16 `[tokens, num_heads, kv_lora_rank + rope]`."""
    nope = jnp.einsum("thd,hdr->thr", projections.query_nope, params["k_up"])
    return jnp.concatenate([nope, projections.query_rope], axis=-1).astype(jnp.bfloat16)


def project_output(
    params: MLAParams, out: Float[Array, "t h rank"], dtype=jnp.bfloat16
) -> Float[Array, "t hidden"]:
    """Latent attention outputs `[tokens, num_heads, >= kv_lora_rank]` back to `[tokens, hidden]`.

    Values past `kv_lora_rank` are left out: FP8_V4 rows are attended whole, rotary part included.
    Under tensor parallelism this is one shard's part: sum it over the shards.
    """
    rank = params["v_up"].shape[1]
    values = jnp.einsum("thr,hrv->thv", out[..., :rank].astype(dtype), params["v_up"])
    return jnp.einsum("thv,hvd->td", values, params["out"])
