"""Prefill and decode of the byte model over paged caches: what is compiled, and nothing else."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.stages import Compiled
from jaxtyping import Array, Float, Int, PRNGKeyArray

from examples.byte_lm import VOCABULARY, ByteLMConfig, Params, mlp, read_out
from jmla import BatchMeta, Cache, Plan, make_batch, select_topk
from jmla.hisparse import HiSparsePool, HiSparseState, admit, assign_pages
from jmla.model import mla_attention, rms_norm

Caches = tuple[Cache | HiSparseState, ...]

# What a query attends to: the indexer's choice, or one of two floors to hold it against.
Chooser = Literal["indexer", "last", "random"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What the decode loop carries; donated from call to call.

    Attributes:
        caches: one a layer.
        seq_lens: int32 `[b]`, bytes stored of each request.
        token: int32 `[b]`, each request's newest byte, not stored yet.
        key: of the sampling.
    """

    caches: Caches
    seq_lens: Int[Array, " b"]
    token: Int[Array, " b"]
    key: PRNGKeyArray


def forward(
    params: Params,
    config: ByteLMConfig,
    plan: Plan,
    tokens: Int[Array, " t"],
    caches: Caches,
    batch: BatchMeta,
    *,
    phase: Literal["prefill", "decode"],
    chooser: Chooser = "indexer",
) -> tuple[Float[Array, "t v"], Caches]:
    """Logits after each token, f32, and the caches with the tokens appended, one cache a layer.

    Args:
        params: the parameters; their dtype is the dtype of the products.
        config: the sizes.
        plan: how attention is done.
        tokens: bytes, in the order of `batch`; padding may hold anything.
        caches: one a layer.
        batch: where each token belongs.
        phase: which half of the plan attends.
        chooser: what each token attends to.
    """
    x = params["embed"][tokens]
    positions = None if chooser == "indexer" else floor_positions(batch, config, chooser)
    appended = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        normed = rms_norm(x, layer["attention_norm"], config.mla.norm_eps)
        attended = mla_attention(
            layer["attention"],
            config.mla,
            plan,
            normed,
            cache,
            batch,
            phase=phase,
            positions=positions,
        )
        x = x + attended.out
        x = x + mlp(layer, config, x)
        appended.append(attended.cache)
    return read_out(params, config, x), tuple(appended)


def floor_positions(batch: BatchMeta, config: ByteLMConfig, chooser: Chooser) -> Int[Array, "t k"]:
    """The last k positions of each token, or its own and k - 1 random earlier ones."""
    k = config.mla.index_topk
    own = batch.token_position[:, None]
    if chooser == "last":
        return jnp.maximum(own - jnp.arange(k, dtype=jnp.int32)[None], -1)
    context = batch.page_table.shape[1] * batch.page_size
    # A token's draw depends on its position alone, so chunks and phases agree.
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(batch.token_position)
    scores = jax.vmap(lambda key: jax.random.uniform(key, (context,)))(keys)
    scores = jnp.where(jnp.arange(context)[None] == own, jnp.inf, scores)
    return select_topk(scores, batch.lengths, k)


def extend(
    params: Params,
    caches: Caches,
    page_table: Int[Array, "b pages"],
    stored: Int[Array, " b"],
    counts: Int[Array, " b"],
    tokens: Int[Array, " t"],
    *,
    config: ByteLMConfig,
    plan: Plan,
    phase: Literal["prefill", "decode"],
    chooser: Chooser = "indexer",
) -> tuple[Caches, Float[Array, "t v"]]:
    """Append `counts` bytes to the requests after their `stored` ones; the logits after each.

    `tokens` holds the requests' bytes back to back; what is past them is padding, so that every
    chunk of a prompt, the last included, runs the same program.
    """
    batch = make_batch(
        stored + counts,
        counts,
        page_table,
        num_tokens=tokens.shape[0],
        page_size=plan.config.page_size,
    )
    logits, caches = forward(
        params, config, plan, tokens, caches, batch, phase=phase, chooser=chooser
    )
    return caches, logits


prefill_chunk = jax.jit(
    partial(extend, phase="prefill"),
    static_argnames=("config", "plan", "chooser"),
    donate_argnames=("caches",),
)


def sample(
    logits: Float[Array, "b v"], key: PRNGKeyArray, temperature: Float[Array, ""]
) -> Int[Array, " b"]:
    """A byte for each request; the likeliest one at temperature 0."""
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    best = jnp.argmax(logits, axis=-1)
    return jnp.where(temperature > 0, drawn, best).astype(jnp.int32)


@jax.jit
def first_token(
    logits: Float[Array, "t v"],
    count: Int[Array, " 1"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
) -> Int[Array, " 1"]:
    """The byte after the last of the `count` that a prefill chunk appended."""
    last = jax.lax.dynamic_slice_in_dim(logits, count[0] - 1, 1)
    return sample(last, key, temperature)


@partial(jax.jit, static_argnames=("steps", "config", "plan"), donate_argnames=("state",))
def decode_loop(
    params: Params,
    state: DecodeState,
    page_table: Int[Array, "b pages"],
    temperature: Float[Array, ""],
    *,
    steps: int,
    config: ByteLMConfig,
    plan: Plan,
) -> tuple[DecodeState, Int[Array, "steps b"]]:
    """Generate `steps` bytes for each request without leaving the device.

    Returns the state to go on from and the bytes, in order.
    """

    def step(state: DecodeState, _) -> tuple[DecodeState, Int[Array, " b"]]:
        caches, logits = extend(
            params,
            state.caches,
            page_table,
            state.seq_lens,
            jnp.ones_like(state.seq_lens),
            state.token,
            config=config,
            plan=plan,
            phase="decode",
        )
        key, draw = jax.random.split(state.key)
        token = sample(logits, draw, temperature)
        return DecodeState(caches, state.seq_lens + 1, token, key), token

    return jax.lax.scan(step, state, None, length=steps)


def new_caches(
    plan: Plan, config: ByteLMConfig, *, requests: int, context: int
) -> tuple[tuple[Cache, ...], Int[Array, "b pages"]]:
    """Empty caches for `requests` of up to `context` bytes, one a layer, and their page table.

    The pages of a request are scattered, as they are in a pool that has been in use for a while.
    """
    pages = -(-context // plan.config.page_size)
    order = jax.random.permutation(jax.random.key(1), requests * pages)
    caches = tuple(plan.init_cache(requests * pages) for _ in range(config.layers))
    return caches, order.reshape(requests, pages).astype(jnp.int32)


def new_host_caches(
    plan: Plan, config: ByteLMConfig, *, context: int
) -> tuple[tuple[HiSparseState, ...], Int[Array, "1 pages"]]:
    """Empty host-resident caches for one request of up to `context` bytes, and its page table.

    The request owns its pages from the start, so that no step lacks one.
    """
    assert plan.config.hisparse is not None
    page_size, hisparse = plan.config.page_size, plan.config.hisparse
    buffer = hisparse.buffer_rows(plan.config.index_topk) + 1
    share = -(-context // (page_size * hisparse.host_to_device_ratio))
    sizes = plan.hisparse_sizes(
        requests=1, max_length=context, num_buffer_pages=max(-(-buffer // page_size), share)
    )
    pool = HiSparsePool.empty(sizes).reserve(0, context)
    tables = pool.page_table, pool.buffer_table
    # Each layer has its own copy of the tables, because the layers' states are donated together.
    states = tuple(
        assign_pages(plan.init_hisparse(sizes), *(jnp.array(table) for table in tables))
        for _ in range(config.layers)
    )
    return states, jnp.array(pool.page_table)


@partial(jax.jit, donate_argnames=("states",))
def move_to_host(
    states: tuple[HiSparseState, ...],
    caches: tuple[Cache, ...],
    page_table: Int[Array, "1 pages"],
    length: Int[Array, " 1"],
) -> tuple[HiSparseState, ...]:
    """The states with the prefilled request of `caches` admitted."""
    return tuple(
        admit(state, jnp.int32(0), length[0], cache, page_table[0])
        for state, cache in zip(states, caches, strict=True)
    )


@dataclass(frozen=True)
class Programs:
    """What runs, compiled once: a chunk of a prompt, the byte after it, a chunk of new bytes."""

    prefill: Compiled
    first: Compiled
    decode: Compiled


def compile_programs(
    params: Params,
    config: ByteLMConfig,
    plan: Plan,
    caches: tuple[Cache, ...],
    page_table: Array,
    state: DecodeState,
    decode_table: Array,
    *,
    chunk: int,
    steps: int,
) -> Programs:
    """Compile a prefill into `caches` and a decode from `state`, each with its page table.

    A call of the prefill takes `chunk` bytes, one of the decode makes `steps`.
    """
    text = jax.ShapeDtypeStruct((chunk,), jnp.int32)
    logits = jax.ShapeDtypeStruct((chunk, VOCABULARY), jnp.float32)
    lens, heat = state.seq_lens, jnp.float32(0)
    sizes = {"config": config, "plan": plan}
    return Programs(
        prefill_chunk.lower(params, caches, page_table, lens, lens, text, **sizes).compile(),
        first_token.lower(logits, lens, state.key, heat).compile(),
        decode_loop.lower(params, state, decode_table, heat, steps=steps, **sizes).compile(),
    )
