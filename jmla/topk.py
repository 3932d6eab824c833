"""Which tokens a query attends to: exact top-k, and what its positions mean to a cache.

`select_topk` returns positions inside each row's own window. An attention op wants something else:
slots of the paged cache (PAGED, `paged_indices`) or rows of one contiguous buffer that holds all
requests back to back (RAGGED, `ragged_indices`). -1 means "no token" throughout.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, UInt32

from jmla._checks import check_int32

_WORD = 32
# On CPU a block of rows stays in the second-level cache during the 32 passes over it.
_CPU_BLOCK_SCORES = 1 << 18


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
        implementation: `"xla"` or None, the best supported one.

    Returns:
        int32 `[rows, k]`: positions relative to the window's start, ascending, then -1. Exactly
        `min(length, k)` of them are not -1.

    Raises:
        ValueError: wrong shapes or dtypes, or `k < 1`.
        NotImplementedError: `implementation="mosaic_gpu"`.
    """
    if scores.ndim != 2 or scores.dtype != jnp.float32:
        raise ValueError(
            f"{scores.shape=}, {scores.dtype=}: expected f32 [rows, s]; merge leading axes with "
            "reshape, or use jax.vmap"
        )
    rows, columns = scores.shape
    check_int32("lengths", lengths, (rows,))
    if row_starts is not None:
        check_int32("row_starts", row_starts, (rows,))
    if k < 1:
        raise ValueError(f"{k=}: expected at least 1")
    if implementation == "mosaic_gpu":
        raise NotImplementedError(
            "implementation='mosaic_gpu': there is no top-k kernel; use 'xla' or None"
        )
    if implementation not in (None, "xla"):
        raise ValueError(f"{implementation=}: expected 'xla', 'mosaic_gpu' or None")

    starts = jnp.zeros_like(lengths) if row_starts is None else jnp.clip(row_starts, 0, columns)
    lengths = jnp.clip(lengths, 0, columns - starts)
    identity = identity_topk(lengths, k)
    if columns <= k or rows == 0:
        return identity

    def one_row(row: tuple[Array, Array, Array]) -> Array:
        return _largest(*row, k)

    def in_blocks(scores: Array, starts: Array, lengths: Array) -> Array:
        block = min(rows, max(1, _CPU_BLOCK_SCORES // columns))
        return lax.map(one_row, (scores, starts, lengths), batch_size=block)

    def at_once(scores: Array, starts: Array, lengths: Array) -> Array:
        return jax.vmap(one_row)((scores, starts, lengths))

    selected = lax.platform_dependent(scores, starts, lengths, cpu=in_blocks, default=at_once)
    return jnp.where(lengths[:, None] <= k, identity, selected)


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


def paged_indices(
    positions: Int[Array, "rows k"],
    page_table: Int[Array, "requests pages"],
    *,
    page_size: int,
    requests: Int[Array, " rows"] | None = None,
) -> Int32[Array, "rows k"]:
    """The cache slots of positions: the position's page times the page size, plus the rest.

    Every position that names no slot gives -1: negative ones, positions past the table's last
    page, pages that are negative or too large for an int32 slot, and all positions of a row whose
    request does not exist. Whether a page is in the cache is for the reader of the slot to check.

    Args:
        positions: int32 `[rows, k]`, each inside its request.
        page_table: int32 `[requests, max_pages]`; entries past a request's end may hold anything.
        page_size: tokens per page.
        requests: int32 `[rows]`, the row of the page table that each row of positions uses; None:
            row `i` uses row `i`, and both must have the same number of rows.

    Returns:
        int32 `[rows, k]` slots.

    Raises:
        ValueError: wrong shapes or dtypes, or `page_size < 1`.
    """
    if positions.ndim != 2:
        raise ValueError(f"{positions.shape=}: expected [rows, k]")
    if page_table.ndim != 2:
        raise ValueError(f"{page_table.shape=}: expected [requests, max_pages]")
    check_int32("positions", positions, positions.shape)
    check_int32("page_table", page_table, page_table.shape)
    if page_size < 1:
        raise ValueError(f"{page_size=}: expected at least 1")
    rows = positions.shape[0]
    if requests is None:
        if page_table.shape[0] != rows:
            raise ValueError(
                f"{page_table.shape=}, {positions.shape=}: without requests= both need the same "
                "number of rows; pass requests, the page-table row of each row of positions"
            )
        requests = lax.iota(jnp.int32, rows)
    check_int32("requests", requests, (rows,))

    if 0 in page_table.shape:
        return jnp.full_like(positions, -1)
    page_of = jnp.floor_divide(positions, page_size)
    page = page_table.at[requests[:, None], page_of].get(
        mode="fill", fill_value=-1, wrap_negative_indices=False
    )
    last_page = jnp.iinfo(jnp.int32).max // page_size - 1
    slot = jnp.clip(page, 0, last_page) * page_size + (positions - page_of * page_size)
    return jnp.where((page >= 0) & (page <= last_page), slot, -1)


def ragged_indices(
    positions: Int[Array, "rows k"], offsets: Int[Array, " rows"]
) -> Int32[Array, "rows k"]:
    """Positions as rows of the contiguous buffer in which row `i`'s request begins at `offsets[i]`.

    Args:
        positions: int32 `[rows, k]`; negative ones mean "no token".
        offsets: int32 `[rows]`, e.g. `BatchMeta.ragged_offsets`.

    Returns:
        int32 `[rows, k]`: `positions + offset`, -1 where the position is negative.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    if positions.ndim != 2:
        raise ValueError(f"{positions.shape=}: expected [rows, k]")
    check_int32("positions", positions, positions.shape)
    check_int32("offsets", offsets, positions.shape[:1])
    return jnp.where(positions < 0, -1, positions + offsets[:, None])


def _largest(scores: Array, start: Array, length: Array, k: int) -> Array:
    """Ascending positions of the `k` largest of one row's window, whose length is above `k`."""
    keys = _ordered_keys(scores, start, length)
    threshold = _kth_largest(keys, k)
    above = _pack(keys > threshold)
    ties = _lowest_bits(_pack(keys == threshold), k - jnp.sum(_count(above)))
    return _bit_positions(above | ties, k) - start


def _ordered_keys(scores: Array, start: Array, length: Array) -> UInt32[Array, " s"]:
    """Unsigned numbers in the order of the scores: 0 outside the window, 1 for NaN."""
    # On the bits alone: a float comparison would take subnormal numbers for zero on CPU.
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    sign, infinity = jnp.uint32(1 << 31), jnp.uint32(0x7F800000)
    magnitude = bits & ~sign
    keys = jnp.where((bits < sign) | (magnitude == 0), magnitude | sign, ~bits)
    keys = jnp.where(magnitude > infinity, jnp.uint32(1), keys)
    column = lax.iota(jnp.int32, scores.shape[0])
    inside = (column >= start) & (column - start < length)
    keys = jnp.where(inside, keys, jnp.uint32(0))
    return jnp.pad(keys, (0, -keys.size % _WORD))


def _kth_largest(keys: Array, k: int) -> Array:
    """The largest number that at least `k` keys reach, found bit by bit."""

    def add_bit(i: Array | int, bound: Array) -> Array:
        candidate = bound | (jnp.uint32(1 << 31) >> jnp.asarray(i, jnp.uint32))
        enough = jnp.sum((keys >= candidate).astype(jnp.int32)) >= k
        return jnp.where(enough, candidate, bound)

    # The first bit outside the loop gives the carry the keys' own type under shard_map.
    return lax.fori_loop(1, 32, add_bit, add_bit(0, jnp.uint32(0)))


def _pack(mask: Array) -> UInt32[Array, " words"]:
    """A mask as words; its element `32 * i + j` is bit `j` of word `i`."""
    mask = mask.reshape(-1, _WORD)
    bit = jnp.uint32(1) << lax.broadcasted_iota(jnp.uint32, mask.shape, 1)
    return jnp.sum(jnp.where(mask, bit, jnp.uint32(0)), axis=1, dtype=jnp.uint32)


def _count(words: Array) -> Array:
    return lax.population_count(words).astype(jnp.int32)


def _nth_bit(word: Array, n: Array) -> Array:
    """Where the `n`-th (from 0) set bit of each word is; anything if there are no more than `n`."""
    position = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << half) - 1)
        in_low = _count(low)
        upper = n >= in_low
        word = jnp.where(upper, word >> jnp.uint32(half), low)
        position = jnp.where(upper, position + half, position)
        n = jnp.where(upper, n - in_low, n)
    return position


def _lowest_bits(words: Array, n: Array) -> Array:
    """The lowest `n` set bits of a row of words; the others cleared."""
    counts = _count(words)
    left = jnp.clip(n - (jnp.cumsum(counts) - counts), 0, _WORD)
    below = (jnp.uint32(1) << _nth_bit(words, left).astype(jnp.uint32)) - jnp.uint32(1)
    return jnp.where(left >= counts, words, words & below)


def _bit_positions(words: Array, k: int) -> Int32[Array, " k"]:
    """Where the first `k` set bits of a row of words are, ascending."""
    counts = _count(words)
    up_to = jnp.cumsum(counts)
    n = lax.iota(jnp.int32, k)
    word = jnp.minimum(jnp.searchsorted(up_to, n, side="right"), words.size - 1)
    return word * _WORD + _nth_bit(words[word], n - (up_to - counts)[word])
