"""The attention ops: sparse decode, sparse prefill, dense decode, and merging partial results.

What all of them share:

- A query is a latent-space row of `rows.width` values (512 + 64 for the published models), an
  output has `rows.value_dim`. Logits are `sm_scale * q . k`; `sm_scale` has no default, because
  no function of the row's width is right for every model.
- Keys are the cache rows dequantised, to bf16 unless the implementation says otherwise. Products
  are summed in f32 and the softmax is f32.
- lse is f32 and the natural logarithm of the sum of exponentiated logits, without the sink.
- An index outside `[0, rows.num_slots)` is masked, at any place in the list; an index that occurs
  twice counts twice. A cache row that no valid index names may hold NaN.
- A row of queries with nothing to attend gives out 0, lse -inf and max_logits -inf.
- `attn_sink` adds a key of that logit and of value zero to each head; it may be infinite.
- Wrong arguments raise ValueError when the op is traced.
- Derivatives are with respect to q, sm_scale and the sinks. Cache rows are data: `"xla"` and
  `"mosaic_gpu"` give zero for them.

`implementation`:

- `"xla"` runs everywhere, in bounded memory: at most 32768 gathered keys are alive at a time
  (`jmla._xla_attention.MAX_GATHERED_ROWS`). In it a row's bits depend neither on the batch around
  it nor on the number of heads, but for the last bit of lse on a GPU.
- `"mosaic_gpu"` are kernels for Hopper (compute capability 9.0), of sparse decode, sparse prefill
  and dense decode: of caches in any layout, with latents of 512 + 64 values (FP8_V4: 448 + 64).
  They read FP8 and FP4 values as they are stored, without rounding them to bf16 on the way. With
  `num_splits` given, a row's bits do not depend on the batch, and on the number of heads only in
  whether it is above 32 (in dense decode those of all tokens of a request); None, and prefill,
  choose by the shapes. Their derivatives are those of
  `"xla"`. A call that they do not serve raises NotImplementedError with every reason. Any machine
  can trace and lower them, to compile them ahead of time; they compile for Hopper only.
- `"reference"` is `jmla.reference`.
- None is `"mosaic_gpu"` where JAX's default device is a GPU of compute capability 9.0 and the
  kernel serves the call, and `"xla"` otherwise.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla import _attention_checks as checks
from jmla import (
    _implementation,
    _mosaic_decode,
    _mosaic_dense,
    _mosaic_prefill,
    _xla_attention,
    _xla_prefill,
    reference,
)
from jmla.layouts.base import Rows

Implementation = Literal["mosaic_gpu", "xla", "reference"]
"""The code that computes an op; None in its place means the best one that serves the call."""


def sparse_decode(
    q: BFloat16[Array, "b s_q h width"],
    rows: Rows,
    indices: Int[Array, "b s_q topk"],
    *,
    sm_scale: float | Float[Array, ""],
    topk_length: Int[Array, " b"] | Int[Array, "b s_q"] | None = None,
    attn_sink: Float[Array, " h"] | None = None,
    extra_rows: Rows | None = None,
    extra_indices: Int[Array, "b s_q extra_topk"] | None = None,
    extra_topk_length: Int[Array, " b"] | Int[Array, "b s_q"] | None = None,
    num_splits: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[BFloat16[Array, "b s_q h value"], Float[Array, "b s_q h"]]:
    """Attention of decode queries to chosen slots of the cache.

    Args:
        q: bf16 [b, s_q, h, width], the queries of `s_q` tokens of `b` requests.
        rows: the cache, of token shape (slots,) or (pages, page_size).
        indices: int32 [b, s_q, topk], the slots each token attends to.
        sm_scale: factor on the logits, a finite number or an f32 scalar.
        topk_length: int32 [b] or [b, s_q]; indices from this place on are not used.
        attn_sink: f32 [h].
        extra_rows: a second cache that the same softmax covers, with the same width and value
            width; its page size and layout may differ.
        extra_indices: int32 [b, s_q, extra_topk], slots in `extra_rows`.
        extra_topk_length: as `topk_length`, for `extra_indices`.
        num_splits: parts into which each list of keys is cut, and joined by their LSE; fewer if it
            is too short, at most 32 in mosaic_gpu, and more if xla needs them for its bound on
            memory. It changes rounding only, and a fixed number gives a row the same bits in every
            batch. None leaves it to the implementation.
        implementation: see the module.

    Returns:
        out, bf16 [b, s_q, h, value_dim], and lse, f32 [b, s_q, h].

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    checks.check_queries(q, ("batch", "s_q", "heads"), rows)
    checks.check_indices("indices", indices, q.shape[:2], "topk")
    checks.check_lengths("topk_length", topk_length, (q.shape[:1], q.shape[:2]))
    checks.check_sink(attn_sink, q.shape[2])
    checks.check_scale(sm_scale)
    checks.check_splits(num_splits)
    checks.check_extra(rows, extra_rows, extra_indices, extra_topk_length)
    if extra_indices is not None:
        checks.check_indices("extra_indices", extra_indices, q.shape[:2], "extra_topk")
        checks.check_lengths("extra_topk_length", extra_topk_length, (q.shape[:1], q.shape[:2]))
    chosen = _choose(implementation, _mosaic_decode.unsupported_reasons(q, rows, extra_rows))
    if chosen == "mosaic_gpu":
        return _mosaic_decode.sparse_decode(
            q,
            rows,
            indices,
            sm_scale=sm_scale,
            topk_length=topk_length,
            attn_sink=attn_sink,
            extra_rows=extra_rows,
            extra_indices=extra_indices,
            extra_topk_length=extra_topk_length,
            num_splits=num_splits,
        )
    if chosen == "reference":
        return reference.sparse_decode(
            q,
            rows,
            indices,
            sm_scale=sm_scale,
            topk_length=topk_length,
            attn_sink=attn_sink,
            extra_rows=extra_rows,
            extra_indices=extra_indices,
            extra_topk_length=extra_topk_length,
        )

    lists = [_xla_attention.slot_list(rows, indices, topk_length)]
    if extra_rows is not None and extra_indices is not None:
        lists.append(_xla_attention.slot_list(extra_rows, extra_indices, extra_topk_length))
    out, lse = _xla_attention.decode(
        q.reshape(q.shape[0] * q.shape[1], *q.shape[2:]),
        lists,
        sm_scale=sm_scale,
        attn_sink=attn_sink,
        num_splits=num_splits,
    )
    return out.reshape(*q.shape[:3], rows.value_dim), lse.reshape(q.shape[:3])


def sparse_prefill(
    q: BFloat16[Array, "t h width"],
    rows: Rows,
    indices: Int[Array, "t topk"],
    *,
    sm_scale: float | Float[Array, ""],
    topk_length: Int[Array, " t"] | None = None,
    attn_sink: Float[Array, " h"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[BFloat16[Array, "t h value"], Float[Array, "t h"], Float[Array, "t h"]]:
    """Attention of the tokens of a prompt, or of several, to chosen slots.

    Args:
        q: bf16 [t, h, width].
        rows: the cache, or rows gathered from it, of token shape (slots,) or (pages, page_size).
        indices: int32 [t, topk], the slots each token attends to.
        sm_scale: factor on the logits, a finite number or an f32 scalar.
        topk_length: int32 [t]; indices from this place on are not used.
        attn_sink: f32 [h].
        implementation: see the module.

    Returns:
        out, bf16 [t, h, value_dim]; max_logits, f32 [t, h], the largest `sm_scale * q . k`;
        lse, f32 [t, h].

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    checks.check_queries(q, ("tokens", "heads"), rows)
    checks.check_indices("indices", indices, q.shape[:1], "topk")
    checks.check_lengths("topk_length", topk_length, (q.shape[:1],))
    checks.check_sink(attn_sink, q.shape[1])
    checks.check_scale(sm_scale)
    chosen = _choose(implementation, _mosaic_decode.unsupported_reasons(q, rows, None))
    if chosen == "mosaic_gpu":
        return _mosaic_prefill.sparse_prefill(
            q, rows, indices, sm_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink
        )
    if chosen == "reference":
        return reference.sparse_prefill(
            q, rows, indices, sm_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink
        )

    slots = _xla_attention.slot_list(rows, indices, topk_length)
    return _xla_prefill.prefill(q, slots, sm_scale=sm_scale, attn_sink=attn_sink)


def dense_decode(
    q: BFloat16[Array, "b s_q h width"],
    rows: Rows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool = True,
    window: int | None = None,
    num_splits: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[BFloat16[Array, "b s_q h value"], Float[Array, "b s_q h"]]:
    """Attention of each request's last tokens to its whole context.

    Args:
        q: bf16 [b, s_q, h, width], the queries at the last `s_q` positions of each request.
        rows: the cache, of token shape (pages, page_size).
        page_table: int32 [b, max_pages], the pages of each request in order. Entries past the
            request's length may hold anything; a page outside the cache is masked.
        seq_lens: int32 [b], the length of each request with its `s_q` new tokens, at most
            `max_pages * page_size`; positions beyond the table are not attended to.
        sm_scale: factor on the logits, a finite number or an f32 scalar.
        causal: a token attends to positions up to its own; otherwise to all of `seq_lens`.
        window: of these positions a token attends to the last so many; None for all.
        num_splits: parts into which the positions are cut, and joined by their LSE; fewer if there
            are too few, at most 128 in mosaic_gpu. It changes rounding only, and a fixed number
            gives a request the same bits in every batch. None leaves it to the implementation.
        implementation: see the module.

    Returns:
        out, bf16 [b, s_q, h, value_dim], and lse, f32 [b, s_q, h].

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    checks.check_queries(q, ("batch", "s_q", "heads"), rows)
    checks.check_paged(rows)
    checks.check_indices("page_table", page_table, q.shape[:1], "max_pages")
    checks.check_lengths("seq_lens", seq_lens, (q.shape[:1],))
    checks.check_scale(sm_scale)
    checks.check_window(window)
    checks.check_splits(num_splits)
    chosen = _choose(implementation, _mosaic_dense.unsupported_reasons(q, rows, page_table))
    if chosen == "reference":
        return reference.dense_decode(
            q, rows, page_table, seq_lens, sm_scale=sm_scale, causal=causal, window=window
        )
    attend = _mosaic_dense if chosen == "mosaic_gpu" else _xla_attention
    return attend.dense_decode(
        q,
        rows,
        page_table,
        seq_lens,
        sm_scale=sm_scale,
        causal=causal,
        window=window,
        num_splits=num_splits,
    )


def merge(
    outs: Float[Array, "n *rows h value"] | Sequence[Float[Array, "*rows h value"]],
    lses: Float[Array, "n *rows h"] | Sequence[Float[Array, "*rows h"]],
) -> tuple[Float[Array, "*rows h value"], Float[Array, "*rows h"]]:
    """Attention to a union of disjoint key sets, from the results over each set.

    Args:
        outs: [n, ..., h, value_dim], or a sequence of n arrays. What an empty set has here is
            not used.
        lses: f32 [n, ..., h], or a sequence of n arrays. -inf, and +inf as FlashMLA's decode
            returns it, both mean that the set is empty.

    Returns:
        out in the dtype of `outs`, and lse, f32; 0 and -inf where all sets are empty. Computed in
        f32, in the order of the sets.

    Raises:
        ValueError: the shapes do not match, n is 0, or lse is not f32.
    """
    outs, lses = (checks.stack(name, x) for name, x in (("outs", outs), ("lses", lses)))
    if lses.shape != outs.shape[:-1] or lses.dtype != jnp.float32:
        raise ValueError(
            f"{lses.shape=} {lses.dtype=}: expected float32 {outs.shape[:-1]}, one per row and "
            "head of outs; an lse of [batch, heads, s_q] must be transposed first"
        )
    return reference.merge(outs, lses)


def _choose(implementation: Implementation | None, reasons: list[str]) -> str:
    """The implementation to run; `reasons` is what keeps the kernel from serving the call."""
    return _implementation.choose(implementation, reasons, ("xla", "reference"))
