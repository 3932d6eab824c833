"""A resolved config: the jitted prefill and decode of one cache, and why they are what they are.

Both phases share the cache and nothing else. What a phase does is in its own object, which holds no
setting of the other one, so that no batch of one kind can change what a batch of the other does.

Every query attends to *stored* rows: append a step's latents first, then call the phase. A prompt
thus gives the same result however it is cut into chunks, and whatever the rows' layout rounds away
is gone for prefill and decode alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla._dense_prefill import dense_prefill
from jmla._prefill_rows import converted_pages, gathered_rows
from jmla.attention import Implementation, dense_decode, sparse_decode, sparse_prefill
from jmla.backends import IndexTransform, Phase, Reads
from jmla.batch import BatchMeta
from jmla.cache import Cache, init_cache
from jmla.config import Config
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
        reads: "direct", "gather_dequantize" or "convert".
        num_heads: query heads on one device.
        sm_scale: factor of the logits.
        page_size: tokens per page.
        attn_sink: whether calls bring attention sinks.
        num_splits: of sparse decode; None in prefill.
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
    reasons: tuple[str, ...] = dataclasses.field(compare=False)


class PrefillPlan(PhasePlan):
    """A prefill that can be called."""

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
        return _decode(self, q, cache, batch, positions, attn_sink)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `jmla.resolve` makes of a config. Hashable; `str(plan)` explains every choice.

    Attributes:
        config: the config, as it was given.
        platform: the platform it was resolved for, never "auto".
        layout: the layout of the cache.
        layout_reason: why it is that one.
        prefill: the prefill; call it.
        decode: the decode step; call it.
        warnings: what works but deserves a second look.
        explanation: all of this in words, what `str` gives; left out of comparisons.
    """

    config: Config
    platform: str
    layout: KVLayout
    layout_reason: str
    prefill: PrefillPlan
    decode: DecodePlan
    warnings: tuple[str, ...] = ()
    explanation: str = dataclasses.field(default="", compare=False)

    def init_cache(self, num_pages: int) -> Cache:
        """An empty cache of `num_pages` pages in the plan's layout.

        It has index keys unless both phases are dense or `index_head_dim` is None.

        Raises:
            NotImplementedError: the config asks for HiSparse, of which only the routing exists.
        """
        config = self.config
        if config.hisparse is not None:
            raise NotImplementedError(
                f"{config.hisparse=}: jmla has no host-resident cache yet, only its routing and "
                "its checks; resolve the config with hisparse=None for a cache on the device"
            )
        return init_cache(
            self.layout,
            num_pages=num_pages,
            page_size=config.page_size,
            rank=config.kv_lora_rank,
            rope_dim=config.rope_dim,
            scale_format=config.scale_format,
            index_dim=self.index_dim,
        )

    @property
    def index_dim(self) -> int | None:
        """The length of the cache's index keys; None if it has none."""
        transforms = (self.prefill.index_transform, self.decode.index_transform)
        return None if transforms == ("PAGE_TABLE",) * 2 else self.config.index_head_dim

    def __str__(self) -> str:
        return self.explanation


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
    if plan.index_transform == "RAGGED":
        rows = gathered_rows(cache.rows, batch)
        indices = ragged_indices(positions, batch.ragged_offsets)
    else:
        rows, page_table = cache.rows, batch.page_table
        if plan.reads == "convert":
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
            implementation=plan.implementation,
        )
    behind = jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32)
    lengths = (batch.seq_lens[:, None] - behind[None, :]).reshape(b * s_q)
    indices = paged_indices(
        _visible(plan, positions, lengths),
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
    expected = (*tokens, plan.num_heads)
    if q.ndim != len(expected) + 1 or q.shape[:-1] != expected:
        raise ValueError(
            f"{q.shape=}: {plan.phase} expects [{', '.join(map(str, expected))}, width] for this "
            f"batch and a plan of {plan.num_heads} heads on one device; resolve a Config with "
            "another num_heads if the device has more or fewer"
        )
    if cache.layout is not plan.layout:
        raise ValueError(
            f"cache.layout={cache.layout.name}: the plan reads {plan.layout.name}; make the cache "
            "with plan.init_cache, or bring it over with jmla.convert"
        )
    for name, page_size in (("cache", cache.page_size), ("batch", batch.page_size)):
        if page_size != plan.page_size:
            raise ValueError(
                f"{name}.page_size={page_size}: the plan was resolved for "
                f"page_size={plan.page_size}; use the same everywhere"
            )
    if (attn_sink is not None) != plan.attn_sink:
        got = "None" if attn_sink is None else "an array"
        raise ValueError(
            f"attn_sink is {got}: the plan was resolved with attn_sink={plan.attn_sink}; pass "
            f"{'f32 [heads]' if plan.attn_sink else 'none'}, or resolve a Config with "
            f"attn_sink={not plan.attn_sink}"
        )
