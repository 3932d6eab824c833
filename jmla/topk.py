"""Which tokens a query attends to: exact top-k, and what its positions mean to a cache.

`select_topk` returns positions inside each row's own window. An attention op wants something else:
slots of the paged cache (PAGED, `paged_indices`) or rows of one contiguous buffer that holds all
requests back to back (RAGGED, `ragged_indices`). `select_paged_indices` and `select_ragged_indices`
are both steps at once, which on Hopper is one kernel. -1 means "no token" throughout.

`implementation`:

- `"xla"` runs everywhere.
- `"mosaic_gpu"` is a kernel for Hopper (compute capability 9.0) for k up to 4096 and rows of up to
  2^20 columns. Its results are those of `"xla"`, bit for bit. A call that it does not serve raises
  NotImplementedError with every reason. Any machine can trace and lower it, to compile it ahead of
  time; it compiles for Hopper only.
- None is `"mosaic_gpu"` where JAX's default device is a GPU of compute capability 9.0 and the
  kernel serves the call, and `"xla"` otherwise.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jmla import _implementation, _mosaic_topk, _xla_topk
from jmla._checks import check_int32
from jmla._index_transforms import check_pages, paged_indices, ragged_indices

__all__ = [
    "identity_topk",
    "paged_indices",
    "ragged_indices",
    "select_paged_indices",
    "select_ragged_indices",
    "select_topk",
]

_OTHERS = ("xla",)


def select_topk(
    scores: Float[Array, "rows s"],
    lengths: Int[Array, " rows"],
    k: int,
    *,
    row_starts: Int[Array, " rows"] | None = None,
    implementation: str | None = None,
) -> Int32[Array, "rows k"]:
    """The positions of the `k` largest scores of each row's window, exactly.

    Row `i`'s window is `scores[i, row_starts[i] : row_starts[i] + lengths[i]]`; nothing outside it
    influences the result. A row with `lengths[i] <= k` gets `0 .. lengths[i]-1` whatever its scores
    are, so a caller that knows every length to be at most `k` need not compute any (see
    `identity_topk`).

    Order of scores, lowest first: NaN of either sign, -inf, finite numbers (-0.0 equals 0.0), +inf.
    Equal scores: the smaller position wins. -inf and NaN inside the window are still tokens and are
    chosen when fewer than `k` others exist.

    Args:
        scores: f32 `[rows, s]`.
        lengths: int32 `[rows]`, window lengths in tokens; clipped to what the row holds.
        k: how many positions a row of the result has; may exceed `s`.
        row_starts: int32 `[rows]`, the column of each window's position 0, clipped to `[0, s]`;
            None: column 0.
        implementation: see the module.

    Returns:
        int32 `[rows, k]`: positions relative to the window's start, ascending, then -1. Exactly
        `min(length, k)` of them are not -1.

    Raises:
        ValueError: wrong shapes or dtypes, or `k < 1`.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    _check_selection(scores, lengths, k, row_starts)
    if _takes_kernel(scores, k, implementation):
        return _mosaic_topk.select_topk(scores, lengths, k, row_starts)
    return _positions(scores, lengths, k, row_starts)


def select_paged_indices(
    scores: Float[Array, "rows s"],
    lengths: Int[Array, " rows"],
    k: int,
    page_table: Int[Array, "requests pages"],
    *,
    page_size: int,
    requests: Int[Array, " rows"] | None = None,
    row_starts: Int[Array, " rows"] | None = None,
    implementation: str | None = None,
) -> Int32[Array, "rows k"]:
    """The cache slots of the `k` largest scores of each row's window.

    This is `paged_indices(select_topk(scores, lengths, k), page_table)`, without the positions in
    between.

    Args:
        scores: as in `select_topk`, and so are `lengths`, `k` and `row_starts`.
        lengths: see there.
        k: see there.
        page_table: as in `paged_indices`, and so are `page_size` and `requests`.
        page_size: see there.
        requests: see there.
        row_starts: see `select_topk`.
        implementation: see the module.

    Returns:
        int32 `[rows, k]` slots in the order of the positions. -1 where a position has no slot, and
        after the last.

    Raises:
        ValueError: wrong shapes, dtypes or sizes.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    _check_selection(scores, lengths, k, row_starts)
    check_pages(scores.shape[0], page_table, page_size, requests)
    if 0 not in page_table.shape and _takes_kernel(scores, k, implementation):
        return _mosaic_topk.select_paged_indices(
            scores, lengths, k, row_starts, page_table, page_size, requests
        )
    positions = _positions(scores, lengths, k, row_starts)
    return paged_indices(positions, page_table, page_size=page_size, requests=requests)


def select_ragged_indices(
    scores: Float[Array, "rows s"],
    lengths: Int[Array, " rows"],
    k: int,
    offsets: Int[Array, " rows"],
    *,
    row_starts: Int[Array, " rows"] | None = None,
    implementation: str | None = None,
) -> Int32[Array, "rows k"]:
    """The rows of a ragged buffer of the `k` largest scores of each row's window.

    This is `ragged_indices(select_topk(scores, lengths, k), offsets)`, without the positions in
    between.

    Args:
        scores: as in `select_topk`, and so are `lengths`, `k` and `row_starts`.
        lengths: see there.
        k: see there.
        offsets: as in `ragged_indices`.
        row_starts: see `select_topk`.
        implementation: see the module.

    Returns:
        int32 `[rows, k]`: positions plus the row's offset, then -1.

    Raises:
        ValueError: wrong shapes or dtypes, or `k < 1`.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    _check_selection(scores, lengths, k, row_starts)
    check_int32("offsets", offsets, scores.shape[:1])
    if _takes_kernel(scores, k, implementation):
        return _mosaic_topk.select_ragged_indices(scores, lengths, k, row_starts, offsets)
    return ragged_indices(_positions(scores, lengths, k, row_starts), offsets)


def identity_topk(lengths: Int[Array, " rows"], k: int) -> Int32[Array, "rows k"]:
    """What `select_topk` returns for rows no longer than `k`: `0 .. length-1`, then -1.

    Args:
        lengths: int32 `[rows]`; negative ones count as 0. For a length above `k` the result is the
            first `k` positions.
        k: how many positions a row of the result has.

    Returns:
        int32 `[rows, k]`.
    """
    position = lax.broadcasted_iota(jnp.int32, (lengths.shape[0], k), 1)
    return jnp.where(position < lengths[:, None], position, -1)


def _check_selection(scores: Array, lengths: Array, k: int, row_starts: Array | None) -> None:
    if scores.ndim != 2 or scores.dtype != jnp.float32:
        raise ValueError(
            f"{scores.shape=}, {scores.dtype=}: expected f32 [rows, s]; merge leading axes with "
            "reshape, or use jax.vmap"
        )
    check_int32("lengths", lengths, scores.shape[:1])
    if row_starts is not None:
        check_int32("row_starts", row_starts, scores.shape[:1])
    if k < 1:
        raise ValueError(f"{k=}: expected at least 1")


def _takes_kernel(scores: Array, k: int, implementation: str | None) -> bool:
    reasons = _mosaic_topk.unsupported_reasons(scores.shape, k)
    return _implementation.choose(implementation, reasons, _OTHERS) == "mosaic_gpu"


def _positions(scores: Array, lengths: Array, k: int, row_starts: Array | None) -> Array:
    """`select_topk` through XLA."""
    rows, columns = scores.shape
    starts = jnp.zeros_like(lengths) if row_starts is None else jnp.clip(row_starts, 0, columns)
    lengths = jnp.clip(lengths, 0, columns - starts)
    identity = identity_topk(lengths, k)
    if columns <= k or rows == 0:
        return identity
    selected = _xla_topk.select_topk(scores, starts, lengths, k)
    return jnp.where(lengths[:, None] <= k, identity, selected)
