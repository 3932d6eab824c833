"""Grouped-query attention decode over a paged cache of keys and values.

Query heads come in groups, each of which shares one head of the cache. The contract is that of
`fa3` MHA decode with a paged cache, and what the attention ops share holds here, too: see
`jmla.attention`, also for `implementation`. What differs:

- `"mosaic_gpu"` is a kernel for Hopper of bf16, FP8 and FP4 caches with heads of 64 or 128 values.
  It multiplies bf16, of which every FP8 and FP4 value is one, up to scales of 2^93: beyond, FP4
  values are infinite.
- With `num_splits` given, a request's bits do not depend on the batch. Those of one query head
  depend on no other but in whether a group has more than 16 rows, heads by tokens.
"""

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla import _attention_checks as checks
from jmla import _implementation, _mosaic_gqa, _xla_gqa, reference
from jmla.attention import Implementation
from jmla.layouts.key_values import KeyValueRows


def gqa_decode(
    q: BFloat16[Array, "b s_q h dim"],
    rows: KeyValueRows,
    page_table: Int[Array, "b max_pages"],
    seq_lens: Int[Array, " b"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool = True,
    num_splits: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[BFloat16[Array, "b s_q h dim"], Float[Array, "b s_q h"]]:
    """Attention of each request's last tokens to its whole context, with grouped query heads.

    Args:
        q: bf16 [b, s_q, h, head_dim], the queries at the last `s_q` positions of each request. Of
            the h heads, those from `i * h / kv_heads` on attend to head i of the cache.
        rows: the cache, of token shape (pages, page_size).
        page_table: int32 [b, max_pages], the pages of each request in order. Entries past the
            request's length may hold anything; a page outside the cache is masked.
        seq_lens: int32 [b], the length of each request with its `s_q` new tokens, at most
            `max_pages * page_size`; positions beyond the table are not attended to.
        sm_scale: factor on the logits, a finite number or an f32 scalar.
        causal: a token attends to positions up to its own; otherwise to all of `seq_lens`.
        num_splits: parts into which the positions are cut, and joined by their LSE; fewer if there
            are too few, at most 128 in mosaic_gpu. It changes rounding only, and a fixed number
            gives a request the same bits in every batch. None leaves it to the implementation.
        implementation: see the module.

    Returns:
        out, bf16 [b, s_q, h, head_dim], and lse, f32 [b, s_q, h].

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    _check_queries(q, rows)
    checks.check_indices("page_table", page_table, q.shape[:1], "max_pages")
    checks.check_lengths("seq_lens", seq_lens, (q.shape[:1],))
    checks.check_scale(sm_scale)
    checks.check_splits(num_splits)
    reasons = _mosaic_gqa.unsupported_reasons(q, rows, page_table)
    others = tuple(name for name in get_args(Implementation) if name != "mosaic_gpu")
    chosen = _implementation.choose(implementation, reasons, others)
    if chosen == "reference":
        return reference.gqa_decode(q, rows, page_table, seq_lens, sm_scale=sm_scale, causal=causal)
    attend = _mosaic_gqa if chosen == "mosaic_gpu" else _xla_gqa
    return attend.gqa_decode(
        q,
        rows,
        page_table,
        seq_lens,
        sm_scale=sm_scale,
        causal=causal,
        num_splits=num_splits,
    )


def _check_queries(q: Array, rows: KeyValueRows) -> None:
    """Raises ValueError unless `rows` is a sound paged cache, and `q` has queries for it."""
    if not isinstance(rows, KeyValueRows):
        raise ValueError(
            f"{type(rows)=}: expected keys and values; make them with jmla.quantize_key_values or "
            "jmla.zero_key_values"
        )
    rows.check()
    if len(rows.shape) != 2 or rows.shape[1] == 0:
        raise ValueError(
            f"{rows.shape=}: expected rows of token shape (pages, page_size); use "
            "rows.reshape(-1, page_size)"
        )
    if q.ndim != 4 or q.shape[-1] != rows.head_dim:
        raise ValueError(f"{q.shape=}: expected [batch, s_q, heads, {rows.head_dim}]")
    if q.shape[2] == 0 or q.shape[2] % rows.kv_heads:
        raise ValueError(
            f"{q.shape=}: expected a number of heads that is a multiple of {rows.kv_heads=}"
        )
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"{q.dtype=}: expected bfloat16; cast with q.astype(jnp.bfloat16)")
