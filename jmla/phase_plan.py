"""The two halves of a plan: a prefill and a decode that can be called, and what they check.

What a phase does is in its own object, which holds no setting of the other one, so that no batch of
one kind can change what a batch of the other does.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla import _prefill_reads
from jmla._dense_prefill import dense_prefill
from jmla._prefill_rows import converted_pages, gathered_rows
from jmla.attention import Implementation, dense_decode, sparse_decode, sparse_prefill
from jmla.backends import IndexTransform, Phase, Reads
from jmla.batch import BatchMeta
from jmla.cache import Cache
from jmla.hisparse.state import HiSparseState, swap_in
from jmla.layouts.base import KVLayout, Rows
from jmla.topk import paged_indices, ragged_indices


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What one phase does. Hashable, so static under jit.

    Attributes:
        phase: "prefill" or "decode".
        backend: the contract that serves the phase; never a name that picks another.
        implementation: the code that was asked for; None is the best one that serves each call.
        layout: the layout of the cache.
        index_transform: "PAGED", "RAGGED", or "PAGE_TABLE" for dense attention.
        reads: "direct", "gather_dequantize" (of all tokens of the batch, and RAGGED, in sparse
            prefill), "convert", or "fastest" of the first two, which `PrefillPlan.reads_of` tells.
        num_heads: query heads on one device.
        sm_scale: factor of the logits.
        page_size: tokens per page.
        attn_sink: whether calls bring attention sinks.
        num_splits: of sparse decode; None in prefill.
        hisparse: whether the phase reads a `HiSparseState`; False in prefill.
        reasons: why the backend was taken, how it reads, and what runs it. Plans that differ in
            nothing else are equal, and share their compilations.
    """

    phase: Phase
    backend: str
    implementation: Implementation | None
    layout: KVLayout
    index_transform: IndexTransform
    reads: Reads
    num_heads: int
    sm_scale: float
    page_size: int
    attn_sink: bool
    num_splits: int | None
    hisparse: bool
    reasons: tuple[str, ...] = dataclasses.field(compare=False)


class PrefillPlan(PhasePlan):
    """A prefill that can be called."""

    def reads_of(self, tokens: int, topk: int, rows: int) -> Reads:
        """How a call reads the cache: `reads`, or what "fastest" means for these sizes.

        Args:
            tokens: of the call's `q`.
            topk: columns of its `positions`.
            rows: tokens that its page table has room for, `b * max_pages * page_size`.
        """
        if self.reads != "fastest":
            return self.reads
        gathers = _prefill_reads.gathers(self.layout, self.num_heads, tokens, topk, rows)
        return "gather_dequantize" if gathers else "direct"

    def __call__(
        self,
        q: BFloat16[Array, "t h width"],
        cache: Cache,
        batch: BatchMeta,
        positions: Int[Array, "t k"] | None,
        *,
        attn_sink: Float[Array, " h"] | None = None,
    ) -> tuple[BFloat16[Array, "t h value"], Float[Array, "t h"]]:
        """Attention of a batch's new tokens to the positions selected for each.

        RAGGED gathers and dequantises every token of the batch once, and "convert" re-packs every
        page, both into at most `b * max_pages * page_size` rows of the batch's page table.

        Args:
            q: bf16 [t, h, width], the tokens of `batch` in its order.
            cache: the cache, with the new tokens appended.
            batch: describes the `t` tokens; any mixture of requests with and without a prefix.
            positions: int32 [t, k], each inside its token's request, as `select_topk` returns
                them. -1 is masked, and so is a position after the token's own. A dense backend
                does not look at them and takes None, too.
            attn_sink: f32 [h], if the config says so.

        Returns:
            out, bf16 [t, h, value_dim], and lse, f32 [t, h]; 0 and -inf for padding.

        Raises:
            ValueError: an argument does not fit the plan, the batch or the others.
            NotImplementedError: the named implementation cannot serve the call.
        """
        return _prefill(self, q, cache, batch, positions, attn_sink)


class DecodePlan(PhasePlan):
    """A decode step that can be called."""

    def __call__(
        self,
        q: BFloat16[Array, "b s_q h width"],
        cache: Cache,
        batch: BatchMeta,
        positions: Int[Array, "rows k"] | None,
        *,
        attn_sink: Float[Array, " h"] | None = None,
    ) -> tuple[BFloat16[Array, "b s_q h value"], Float[Array, "b s_q h"]]:
        """Attention of each request's last `s_q` tokens to the positions selected for each.

        Args:
            q: bf16 [b, s_q, h, width], the queries at the last `s_q` positions of each request.
            cache: the cache, with the new tokens appended.
            batch: describes `b` requests with `s_q` new tokens each. An idle one has `seq_lens` 0
                and still `new_lens` of `s_q`, which keeps the rows in step; it gets 0 and -inf.
            positions: int32 [b * s_q, k]; row `i * s_q + j` is for `q[i, j]`. As in prefill.
            attn_sink: f32 [h], if the config says so.

        Returns:
            out, bf16 [b, s_q, h, value_dim], and lse, f32 [b, s_q, h].

        Raises:
            ValueError: an argument does not fit the plan, the batch or the others.
            NotImplementedError: the named implementation cannot serve the call.
        """
        if self.hisparse:
            raise ValueError(
                f"{type(cache)=}: a plan with hisparse decodes from a HiSparseState: expected a "
                "call of plan.decode_hisparse; admit the request there with jmla.hisparse.admit"
            )
        return _decode(self, q, cache, batch, positions, attn_sink)


@jax.jit(static_argnums=0)
def _prefill(
    plan: PrefillPlan,
    q: Array,
    cache: Cache,
    batch: BatchMeta,
    positions: Array | None,
    attn_sink: Array | None,
) -> tuple[Array, Array]:
    num_tokens = batch.token_request.shape[0]
    _check_call(plan, q, (num_tokens,), cache, batch, attn_sink)
    if plan.index_transform == "PAGE_TABLE":
        return dense_prefill(
            q, cache.rows, batch, sm_scale=plan.sm_scale, implementation=plan.implementation
        )
    positions = _visible(plan, positions, batch.lengths)
    rows: Rows
    room = batch.page_table.size * batch.page_size
    reads = plan.reads_of(num_tokens, positions.shape[1], room)
    if reads == "gather_dequantize":
        rows = gathered_rows(cache.rows, batch)
        indices = ragged_indices(positions, batch.ragged_offsets)
    else:
        rows, page_table = cache.rows, batch.page_table
        if reads == "convert":
            rows, page_table = converted_pages(rows, batch)
        indices = paged_indices(
            positions, page_table, page_size=plan.page_size, requests=batch.token_request
        )
    out, _, lse = sparse_prefill(
        q,
        rows,
        indices,
        sm_scale=plan.sm_scale,
        attn_sink=attn_sink,
        implementation=plan.implementation,
    )
    return out, lse


@jax.jit(static_argnums=0)
def _decode(
    plan: DecodePlan,
    q: Array,
    cache: Cache,
    batch: BatchMeta,
    positions: Array | None,
    attn_sink: Array | None,
) -> tuple[Array, Array]:
    b = batch.seq_lens.shape[0]
    s_q = q.shape[1] if q.ndim == 4 else 1
    _check_call(plan, q, (b, s_q), cache, batch, attn_sink)
    if plan.index_transform == "PAGE_TABLE":
        return dense_decode(
            q,
            cache.rows,
            batch.page_table,
            batch.seq_lens,
            sm_scale=plan.sm_scale,
            num_splits=plan.num_splits,
            implementation=plan.implementation,
        )
    indices = paged_indices(
        _visible(plan, positions, _causal_lengths(batch.seq_lens, s_q)),
        batch.page_table,
        page_size=plan.page_size,
        requests=jnp.repeat(jnp.arange(b, dtype=jnp.int32), s_q),
    )
    return sparse_decode(
        q,
        cache.rows,
        indices.reshape(b, s_q, indices.shape[1]),
        sm_scale=plan.sm_scale,
        attn_sink=attn_sink,
        num_splits=plan.num_splits,
        implementation=plan.implementation,
    )


@jax.jit(static_argnums=0)
def decode_hisparse(
    plan: DecodePlan,
    q: Array,
    state: HiSparseState,
    seq_lens: Array,
    positions: Array | None,
    attn_sink: Array | None,
) -> tuple[Array, Array, HiSparseState]:
    """See `Plan.decode_hisparse`."""
    b = state.sizes.requests
    s_q = q.shape[1] if q.ndim == 4 else 1
    _check_queries(plan, q, (b, s_q), attn_sink)
    _check_rows(plan, "state", state.layout, state.sizes.page_size)
    visible = _visible(plan, positions, _causal_lengths(seq_lens, s_q))
    state, slots = swap_in(
        state,
        visible.reshape(b, s_q, visible.shape[1]),
        seq_lens,
        # The swap has no code of its own for a reference.
        implementation="xla" if plan.implementation == "reference" else plan.implementation,
    )
    out, lse = sparse_decode(
        q,
        state.buffer_rows,
        slots,
        sm_scale=plan.sm_scale,
        attn_sink=attn_sink,
        num_splits=plan.num_splits,
        implementation=plan.implementation,
    )
    return out, lse, state


def _causal_lengths(seq_lens: Array, s_q: int) -> Array:
    """How many tokens each of the last `s_q` of every request sees, in the order of the queries."""
    behind = jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32)
    return (seq_lens[:, None] - behind[None, :]).reshape(seq_lens.shape[0] * s_q)


def _visible(plan: PhasePlan, positions: Array | None, lengths: Array) -> Array:
    """The positions that a token of that causal length may attend to; -1 in place of the others.

    Page tables hold anything past a request's end, so this is what keeps garbage unread.
    """
    rows = lengths.shape[0]
    if positions is None or positions.ndim != 2 or positions.shape[0] != rows:
        got = "positions=None" if positions is None else f"{positions.shape=}"
        raise ValueError(
            f"{got}: {plan.backend} {plan.phase} expects int32 [{rows}, k], the positions "
            "selected for each query token; get them from jmla.select_topk"
        )
    return jnp.where(positions < lengths[:, None], positions, -1)


def _check_call(
    plan: PhasePlan,
    q: Array,
    tokens: tuple[int, ...],
    cache: Cache,
    batch: BatchMeta,
    attn_sink: Array | None,
) -> None:
    _check_queries(plan, q, tokens, attn_sink)
    _check_rows(plan, "cache", cache.layout, cache.page_size)
    _check_rows(plan, "batch", plan.layout, batch.page_size)


def _check_rows(plan: PhasePlan, name: str, layout: KVLayout, page_size: int) -> None:
    if layout is not plan.layout:
        raise ValueError(
            f"{name}.layout={layout.name}: the plan reads {plan.layout.name}; make the cache "
            "with plan.init_cache, or bring it over with jmla.convert"
        )
    if page_size != plan.page_size:
        raise ValueError(
            f"{name}.page_size={page_size}: the plan was resolved for "
            f"page_size={plan.page_size}; use the same everywhere"
        )


def _check_queries(
    plan: PhasePlan, q: Array, tokens: tuple[int, ...], attn_sink: Array | None
) -> None:
    expected = (*tokens, plan.num_heads)
    if q.ndim != len(expected) + 1 or q.shape[:-1] != expected:
        raise ValueError(
            f"{q.shape=}: {plan.phase} expects [{', '.join(map(str, expected))}, width] for this "
            f"batch and a plan of {plan.num_heads} heads on one device; resolve a Config with "
            "another num_heads if the device has more or fewer"
        )
    if (attn_sink is not None) != plan.attn_sink:
        got = "None" if attn_sink is None else "an array"
        raise ValueError(
            f"attn_sink is {got}: the plan was resolved with attn_sink={plan.attn_sink}; pass "
            f"{'f32 [heads]' if plan.attn_sink else 'none'}, or resolve a Config with "
            f"attn_sink={not plan.attn_sink}"
        )
