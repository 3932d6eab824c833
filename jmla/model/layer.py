"""A whole MLA layer over a paged cache: project, append, choose, attend, project back."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from jmla.backends import Phase
from jmla.batch import BatchMeta
from jmla.cache import Cache, append
from jmla.hisparse.lifecycle import append as append_to_host
from jmla.hisparse.state import HiSparseState
from jmla.index_query import hadamard_rotation, prepare_index_query, quantize_index_query
from jmla.indexer import indexer_logits
from jmla.indexer_topk import paged_indexer_topk
from jmla.layouts import BF16IndexKeyRows, IndexKeyRows, PagedIndexKeyRows
from jmla.model.config import MLAConfig
from jmla.model.mla import (
    IndexerInputs,
    MLAParams,
    Projections,
    absorbed_query,
    project,
    project_output,
)
from jmla.plan import Plan
from jmla.topk import select_topk

# Most f32 logits that a prefill holds at once: 512 MiB. At least those of one token.
_MOST_LOGITS = 1 << 27

_Keys = IndexKeyRows | PagedIndexKeyRows | BF16IndexKeyRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Attended:
    """What a layer returns.

    Attributes:
        out: `[tokens, hidden_size]`, what the layer adds to the residual stream.
        cache: the cache with the tokens' latents and index keys appended; a host-resident one
            also with what the step swapped in.
        positions: int32 `[tokens, index_topk]`, what each token attended to, so that a following
            layer can share the choice; None where the phase attends densely.
    """

    out: Float[Array, "t hidden"]
    cache: Cache | HiSparseState
    positions: Int[Array, "t k"] | None


def mla_attention(
    params: MLAParams,
    config: MLAConfig,
    plan: Plan,
    x: Float[Array, "t hidden"],
    cache: Cache | HiSparseState,
    batch: BatchMeta,
    *,
    phase: Phase,
    positions: Int[Array, "t k"] | None = None,
) -> Attended:
    """One layer's attention for the new tokens of a batch.

    The tokens are appended first and every query reads stored rows, its own included, so that a
    prompt gives the same result however it is cut into chunks.

    Args:
        params: of this layer, see `init_mla`.
        config: the sizes.
        plan: of a `Config` whose `num_heads` divides `config.num_heads`: more heads than the plan
            has are attended in groups of that many, as a tensor-parallel group would, one after
            the other.
        x: `[tokens, hidden_size]`, normalised; the tokens of `batch` in its order.
        cache: this layer's, made by `plan.init_cache`; with HiSparse, a decode takes what
            `plan.init_hisparse` made, and a batch of its page table.
        batch: where each token belongs. For "decode", the same number of tokens for each request.
        phase: "prefill" or "decode": which half of the plan attends.
        positions: int32 `[tokens, k]` of each token's request, -1 for none; None lets this layer's
            indexer choose.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if config.num_heads % plan.config.num_heads:
        raise ValueError(
            f"{config.num_heads=}, {plan.config.num_heads=}: the layer's heads must be a multiple "
            "of the plan's heads per device; resolve a Config whose num_heads divides them."
        )
    projected = project(params, config, x, jnp.maximum(batch.token_position, 0))
    indexer = projected.indexer
    keeps_index_keys = cache.index_keys is not None
    if keeps_index_keys and indexer is None:
        raise ValueError(
            f"{config.index_n_heads=}: the cache keeps index keys but the layer has no indexer; "
            "resolve the plan with index_head_dim=None, or with dense backends."
        )
    keys = indexer.keys if indexer is not None and keeps_index_keys else None
    if keys is not None and cache.index_keys is not None and cache.index_keys.hadamard:
        keys = hadamard_rotation(keys)
    cache = _append(cache, batch, projected, keys, phase)
    choice = plan.prefill if phase == "prefill" else plan.decode
    if positions is None and choice.index_transform != "PAGE_TABLE":
        if indexer is None:
            raise ValueError(
                f"{choice.backend=} attends to chosen positions and {config.index_n_heads=}: pass "
                "positions, or take a dense backend (flashmla)."
            )
        positions = choose_positions(
            indexer,
            cache,
            batch,
            config.index_topk,
            phase=phase,
            first=config.index_init_tokens,
            last=config.index_local_tokens,
            # The op has no code of its own for a reference.
            implementation="xla" if choice.implementation == "reference" else choice.implementation,
        )
    query = absorbed_query(params, projected)
    outs = []
    for group in jnp.split(query, config.num_heads // plan.config.num_heads, axis=1):
        attended, cache = _attend(plan, group, cache, batch, positions, phase)
        outs.append(attended)
    out = project_output(params, jnp.concatenate(outs, axis=1), x.dtype)
    return Attended(out=out, cache=cache, positions=positions)


def choose_positions(
    indexer: IndexerInputs,
    cache: Cache | HiSparseState,
    batch: BatchMeta,
    k: int,
    *,
    phase: Phase,
    first: int = 0,
    last: int = 0,
    implementation: str | None = None,
) -> Int[Array, "t k"]:
    """The `k` positions of its own request that the indexer rates highest for each token.

    Args:
        indexer: the tokens' indexer inputs.
        cache: with the tokens' index keys appended.
        batch: where each token belongs; for "decode" the same number of tokens for each request.
        k: how many.
        phase: "decode" scores pages where they lie; "prefill" lays the keys of all requests back
            to back once for all tokens. Its logits have a column for each slot of the page table,
            and it takes so many tokens at a time that they are at most 2**27, or those of one.
        first: tokens at the start of its request that a token is given in any case.
        last: tokens before it, itself included, likewise.
        implementation: of `jmla.prepare_index_query`, the logits and the selection.

    Returns:
        int32 `[tokens, k]`, -1 for none.

    Raises:
        ValueError: the cache keeps no index keys.
        NotImplementedError: the named implementation cannot serve the logits or the selection.
    """
    keys = cache.index_keys
    if keys is None:
        raise ValueError(
            "cache.index_keys is None: the indexer has nothing to score; make the cache with an "
            "index_dim (Config.index_head_dim)."
        )
    queries, weights = _prepared(indexer, keys, implementation=implementation)
    tokens = queries.shape[0]
    if phase == "decode":
        requests = batch.seq_lens.shape[0]
        by_request = (requests, tokens // max(requests, 1))
        positions = paged_indexer_topk(
            queries.reshape(*by_request, *queries.shape[1:]),
            weights.reshape(*by_request, *weights.shape[1:]),
            keys,
            batch.page_table,
            batch.lengths.reshape(by_request),
            k,
            first=first,
            last=last,
            implementation=implementation,
        )
        return positions.reshape(tokens, k)
    columns = batch.page_table.size * batch.page_size
    rows = keys.gather(batch.ragged_slots(columns))

    def choose(each: tuple[Array, ...]) -> Array:
        queries, weights, starts, ends, lengths = each
        logits = indexer_logits(
            queries,
            weights,
            rows,
            starts,
            ends,
            first=first,
            last=last,
            implementation=implementation,
        )
        return select_topk(logits, lengths, k, row_starts=starts, implementation=implementation)

    tokenwise = (queries, weights, batch.window_starts, batch.window_ends, batch.lengths)
    return _in_blocks(choose, tokenwise, max(1, _MOST_LOGITS // max(1, columns)))


def _prepared(
    indexer: IndexerInputs, keys: _Keys, *, implementation: str | None
) -> tuple[Array, Array]:
    """Queries of the kind of the keys, and their head weights."""
    if isinstance(keys, BF16IndexKeyRows):
        return indexer.queries.astype(jnp.bfloat16), indexer.weights
    hadamard = keys.hadamard
    if indexer.raw_queries is not None:
        return prepare_index_query(
            indexer.raw_queries, hadamard=hadamard, implementation=implementation
        )
    queries = hadamard_rotation(indexer.queries) if hadamard else indexer.queries
    return quantize_index_query(queries, indexer.weights)


def _in_blocks(
    function: Callable[[tuple[Array, ...]], Array], operands: tuple[Array, ...], largest: int
) -> Array:
    """The function of so many entries of each operand at a time, and of zeros after the last."""
    total = operands[0].shape[0]
    count = -(-total // largest)
    if count <= 1:
        return function(operands)
    size = -(-total // count)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, count * size - total), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(count, size, *x.shape[1:])

    result = lax.map(function, tuple(split(x) for x in operands))
    return result.reshape(count * size, *result.shape[2:])[:total]


def _append(
    cache: Cache | HiSparseState,
    batch: BatchMeta,
    projected: Projections,
    keys: Float[Array, "t dim"] | None,
    phase: Phase,
) -> Cache | HiSparseState:
    if isinstance(cache, Cache):
        return append(cache, batch.write_slots, projected.raw_latents, keys)
    if phase == "prefill":
        raise ValueError(
            f"{phase=} {type(cache)=}: expected a Cache: a prompt is written on the device and "
            "then admitted; use plan.init_cache and jmla.hisparse.admit"
        )
    requests = batch.seq_lens.shape[0]
    latents = projected.latents.reshape(requests, -1, projected.latents.shape[1])
    keys = None if keys is None else keys.reshape(requests, -1, keys.shape[1])
    return append_to_host(cache, batch.seq_lens, latents, keys)


def _attend(
    plan: Plan,
    query: BFloat16[Array, "t h width"],
    cache: Cache | HiSparseState,
    batch: BatchMeta,
    positions: Int[Array, "t k"] | None,
    phase: Phase,
) -> tuple[BFloat16[Array, "t h value"], Cache | HiSparseState]:
    requests = batch.seq_lens.shape[0]
    if isinstance(cache, HiSparseState):
        by_request = query.reshape(requests, -1, *query.shape[1:])
        out, _, cache = plan.decode_hisparse(by_request, cache, batch.seq_lens, positions)
    elif phase == "prefill":
        return plan.prefill(query, cache, batch, positions)[0], cache
    else:
        by_request = query.reshape(requests, -1, *query.shape[1:])
        out, _ = plan.decode(by_request, cache, batch, positions)
    return out.reshape(query.shape[0], *out.shape[2:]), cache
