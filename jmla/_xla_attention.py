"""The attention ops through XLA: gather, dequantise, two matrix products, in bounded memory.

One loop serves all ops. A *row* is a query token, or several that share a list of keys; a list is
given by pages, so that slots are pages of one token. A step takes `rows_per_step` rows and at most
`KEYS_PER_STEP` keys of each, and joins them to the rows' running softmax, so no more than
`MAX_GATHERED_ROWS` gathered keys are ever alive, whatever the batch, the number of heads or the
length of the lists. A cache of no more slots than that may be dequantised ahead of the loop.

Every matrix product has a shape that depends on neither the batch nor the number of heads (rows
are padded to whole steps, heads to whole blocks): the library that computes it may sum in another
order for another shape, and the same row must have the same bits in every batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from jmla._running_softmax import RunningSoftmax, finite_top
from jmla.layouts.base import Rows
from jmla.layouts.bf16 import BF16Rows
from jmla.reference import apply_sink, causal_lengths

HEAD_BLOCK = 16
KEYS_PER_STEP = 2048
DECODE_ROWS_PER_STEP = 16
MAX_ROWS_PER_STEP = 128
# Measured on two cores: a decode of one request took 0.5 ms and 2.7 ms in steps of 1 and 16 rows.
CPU_DECODE_ROWS_PER_STEP = 1
# The same for prefill: 4096 prompt tokens took 0.5 s and 0.2 s.
CPU_PREFILL_ROWS_PER_STEP = 16
MAX_GATHERED_ROWS = DECODE_ROWS_PER_STEP * KEYS_PER_STEP


class KeyLists(NamedTuple):
    """The keys of `n` rows: their order is the order of the pages, then of tokens in a page.

    Attributes:
        rows: where the keys are stored, of any token shape.
        pages: int32 [n, max_pages]. Tokens of a page outside `[0, num_slots / page_size)` are
            masked.
        lengths: int32 [n, tokens]: how many leading keys of its list each query token attends to.
            One column serves all tokens.
    """

    rows: Rows
    pages: Int[Array, "n max_pages"]
    lengths: Int[Array, "n tokens"]


_Results = tuple[
    BFloat16[Array, "n tokens h value"], Float[Array, "n tokens h"], Float[Array, "n tokens h"]
]


def slot_list(
    rows: Rows, indices: Int[Array, "*rows topk"], topk_length: Int[Array, "..."] | None
) -> KeyLists:
    """One list of keys per query token: a slot is a page of one token."""
    *batch, topk = indices.shape
    if topk_length is None:
        lengths = jnp.full(batch, topk, jnp.int32)
    else:
        missing = len(batch) - topk_length.ndim
        lengths = jnp.broadcast_to(topk_length.reshape(topk_length.shape + (1,) * missing), batch)
    n = math.prod(batch)
    return KeyLists(rows, indices.reshape(n, topk), lengths.reshape(n, 1))


@functools.partial(
    jax.jit,
    static_argnames=("page_sizes", "num_splits", "rows_per_step", "cpu_rows_per_step", "window"),
)
def attend(
    q: BFloat16[Array, "n tokens h width"],
    lists: Sequence[KeyLists],
    *,
    page_sizes: tuple[int, ...],
    sm_scale: float | Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
    num_splits: int,
    rows_per_step: int,
    cpu_rows_per_step: int,
    window: int | None = None,
) -> _Results:
    """Attention of `n` rows to the union of their lists.

    Args:
        q: the queries; a row's tokens share its lists.
        lists: one or more lists for each row, in caches of equal width.
        page_sizes: tokens per page of each of `lists`.
        sm_scale: factor on the logits.
        attn_sink: a logit per head, or None.
        num_splits: each list is cut into at least this many parts, which are joined by their LSE.
        rows_per_step: rows of one step; times the keys of a step at most `MAX_GATHERED_ROWS`.
        cpu_rows_per_step: the same on CPU. A few rows waste no time there on padding, many
            make the matrix products faster.
        window: of the leading keys of its list each token attends to at most the last so many;
            None for all.

    Returns:
        out, the largest logit and the natural-log LSE of each token and head.
    """
    scale = jnp.asarray(sm_scale, jnp.float32)
    loop = functools.partial(
        _attend_loop, page_sizes=page_sizes, num_splits=num_splits, window=window
    )
    return lax.platform_dependent(
        q,
        lists,
        scale,
        attn_sink,
        cpu=functools.partial(loop, rows_per_step=cpu_rows_per_step),
        default=functools.partial(loop, rows_per_step=rows_per_step),
    )


def decode(
    q: BFloat16[Array, "n h width"],
    lists: Sequence[KeyLists],
    *,
    sm_scale: float | Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
    num_splits: int | None,
) -> tuple[BFloat16[Array, "n h value"], Float[Array, "n h"]]:
    """out and lse of query tokens that each have a `slot_list` of their own in every cache."""
    out, _, lse = attend(
        q[:, None],
        lists,
        page_sizes=(1,) * len(lists),
        sm_scale=sm_scale,
        attn_sink=attn_sink,
        rows_per_step=DECODE_ROWS_PER_STEP,
        cpu_rows_per_step=CPU_DECODE_ROWS_PER_STEP,
        num_splits=num_splits or 1,
    )
    return out[:, 0], lse[:, 0]


def dense_decode(
    q: BFloat16[Array, "b s_q h width"],
    rows: Rows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool,
    window: int | None,
    num_splits: int | None,
) -> tuple[BFloat16[Array, "b s_q h value"], Float[Array, "b s_q h"]]:
    """out and lse of the last tokens of requests over `rows` of token shape (pages, page_size)."""
    out, _, lse = attend(
        q,
        [KeyLists(rows, page_table, causal_lengths(seq_lens, q.shape[1], causal))],
        page_sizes=(rows.shape[1],),
        sm_scale=sm_scale,
        attn_sink=None,
        rows_per_step=DECODE_ROWS_PER_STEP,
        cpu_rows_per_step=CPU_DECODE_ROWS_PER_STEP,
        num_splits=num_splits or 1,
        window=window,
    )
    return out, lse


def widest_step(num_keys: int) -> int:
    """How many rows with lists of `num_keys` fit in a step: fewer steps keep a GPU busier.

    It depends on the length of the lists alone, as the shapes of the products must.
    """
    return min(MAX_ROWS_PER_STEP, MAX_GATHERED_ROWS // min(num_keys, KEYS_PER_STEP))


def _attend_loop(
    q: BFloat16[Array, "n tokens h width"],
    lists: Sequence[KeyLists],
    scale: Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
    *,
    page_sizes: tuple[int, ...],
    num_splits: int,
    rows_per_step: int,
    window: int | None,
) -> _Results:
    n, tokens, heads, width = q.shape
    padding = -n % rows_per_step
    steps = (n + padding) // rows_per_step
    value_dim = lists[0].rows.value_dim

    def in_steps(x: Array, fill: int) -> Array:
        if padding:
            x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(steps, rows_per_step, *x.shape[1:])

    stores = [_cheapest_store(each.rows.flat(), each.pages.size) for each in lists]
    operands = (
        # Without the tokens axis: where its length is 1, XLA would copy q on the way to the loop.
        in_steps(q.reshape(n, tokens * heads, width), 0),
        [(in_steps(each.pages, -1), in_steps(each.lengths, 0)) for each in lists],
    )

    # Derivatives compute a step anew: what all steps gathered and weighed would not fit in memory.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop keeps them apart
    def step(operands):
        merged_q, tables = operands
        q = merged_q.reshape(rows_per_step, tokens, heads, width)
        softmax = _attend_step(q, stores, tables, page_sizes, scale, num_splits, window)
        out, top, lse = _finish(softmax, q.shape, value_dim)
        if attn_sink is not None:
            out = apply_sink(out, lse, attn_sink)
        return out.astype(q.dtype), top, lse

    out, top, lse = (x.reshape(n + padding, *x.shape[2:])[:n] for x in lax.map(step, operands))
    return out, top, lse


def _cheapest_store(rows: Rows, reads: int) -> Rows:
    """`rows`, dequantised at once if that is fewer rows than the loop would dequantise.

    The dequantised rows are the same bits either way.
    """
    if isinstance(rows, BF16Rows) or rows.num_slots > min(reads, MAX_GATHERED_ROWS):
        return rows
    return BF16Rows(rows.dequantize(), rank=rows.rank, rope_dim=rows.rope_dim)


def _attend_step(
    q: BFloat16[Array, "c tokens h width"],
    stores: Sequence[Rows],
    tables: Sequence[tuple[Int[Array, "c max_pages"], Int[Array, "c tokens"]]],
    page_sizes: Sequence[int],
    scale: Float[Array, ""],
    num_splits: int,
    window: int | None,
) -> RunningSoftmax:
    """The softmax of one step's rows, with axes (tokens and head blocks, c, head, width)."""
    c, tokens, heads, width = q.shape
    head_blocks = math.ceil(heads / HEAD_BLOCK)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, head_blocks * HEAD_BLOCK - heads), (0, 0)))
    q = q.reshape(c, tokens * head_blocks, HEAD_BLOCK, width).swapaxes(0, 1)

    softmax = None
    for store, (pages, lengths), page_size in zip(stores, tables, page_sizes, strict=True):
        block_lengths = jnp.broadcast_to(lengths, (c, tokens)).T.repeat(head_blocks, axis=0)
        num_keys = pages.shape[1] * page_size
        blocks = max(math.ceil(num_keys / KEYS_PER_STEP), min(num_splits, num_keys))
        block_size = math.ceil(num_keys / blocks)
        attend_block = functools.partial(
            _attend_block, q, store, pages, block_lengths, page_size, block_size, scale, window
        )
        first = attend_block(jnp.int32(0))
        softmax = first if softmax is None else softmax.joined_with(first)
        if blocks > 1:
            starts = jnp.arange(1, blocks, dtype=jnp.int32) * block_size
            softmax, _ = lax.scan(functools.partial(_join_block, attend_block), softmax, starts)
    assert softmax is not None, "attend is called with at least one list"
    return softmax


def _attend_block(
    q: BFloat16[Array, "m c head width"],
    store: Rows,
    pages: Int[Array, "c max_pages"],
    lengths: Int[Array, "m c"],
    page_size: int,
    block_size: int,
    scale: Float[Array, ""],
    window: int | None,
    start: Int[Array, ""],
) -> RunningSoftmax:
    """The softmax of every row over the keys `start` to `start + block_size` of its list."""
    places = start + jnp.arange(block_size, dtype=jnp.int32)
    page = pages.at[:, places // page_size].get(
        mode="fill", fill_value=-1, wrap_negative_indices=False
    )
    named = (page >= 0) & (page < store.num_slots // page_size)
    named &= places[None, :] < jnp.max(lengths, axis=0)[:, None]
    if window is not None:
        named &= places[None, :] >= jnp.min(lengths, axis=0)[:, None] - window
    slots = jnp.where(named, page * page_size + (places % page_size)[None, :], -1)
    keys = store.gather(slots).dequantize()

    def attend_heads(
        operands: tuple[BFloat16[Array, "c head width"], Int[Array, " c"]],
    ) -> RunningSoftmax:
        q, lengths = operands
        valid = named & (places[None, :] < lengths[:, None])
        if window is not None:
            valid &= places[None, :] >= lengths[:, None] - window
        logits = jnp.einsum("chw,ckw->chk", q, keys, preferred_element_type=jnp.float32) * scale
        logits = jnp.where(valid[:, None, :], logits, -jnp.inf)
        top = jnp.max(logits, axis=-1)
        weights = jnp.exp(logits - finite_top(top)[..., None])
        # All of the row: cutting the values out of it would copy the gathered keys.
        out = jnp.einsum(
            "chk,ckw->chw", weights.astype(keys.dtype), keys, preferred_element_type=jnp.float32
        )
        return RunningSoftmax(out, top, jnp.sum(weights, axis=-1))

    return lax.map(attend_heads, (q, lengths))


def _join_block(
    attend_block: Callable[[Int[Array, ""]], RunningSoftmax],
    carry: RunningSoftmax,
    start: Int[Array, ""],
) -> tuple[RunningSoftmax, None]:
    return carry.joined_with(attend_block(start)), None


def _finish(
    softmax: RunningSoftmax, q_shape: tuple[int, int, int, int], value_dim: int
) -> tuple[
    Float[Array, "c tokens h value"], Float[Array, "c tokens h"], Float[Array, "c tokens h"]
]:
    """Out, largest logit and LSE; a row with nothing to attend has out 0 and LSE -inf."""
    c, tokens, heads, _ = q_shape
    empty = softmax.total == 0.0
    lse = jnp.where(empty, -jnp.inf, softmax.top + jnp.log(softmax.total))
    out = softmax.out[..., :value_dim] / softmax.total[..., None]
    out = jnp.where(empty[..., None], 0.0, out)

    def by_token(x: Array) -> Array:
        padded_heads = x.shape[0] * HEAD_BLOCK // tokens
        return x.swapaxes(0, 1).reshape(c, tokens, padded_heads, *x.shape[3:])[:, :, :heads]

    return by_token(out), by_token(softmax.top), by_token(lse)
