"""Top-k through XLA: the k-th largest score found bit by bit, and the positions from bit masks."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, UInt32

_WORD = 32
# On CPU a block of rows stays in the second-level cache during the 32 passes over it.
_CPU_BLOCK_SCORES = 1 << 18


def select_topk(
    scores: Float[Array, "rows s"],
    starts: Int[Array, " rows"],
    lengths: Int[Array, " rows"],
    k: int,
) -> Int32[Array, "rows k"]:
    """`jmla.select_topk` of windows inside the rows and longer than k; of shorter ones, anything.

    Args:
        scores: f32 [rows, s], with more than `k` columns and at least one row.
        starts: int32 [rows], columns of the rows.
        lengths: int32 [rows].
        k: how many positions a row of the result has.
    """
    rows, columns = scores.shape

    def one_row(row: tuple[Array, Array, Array]) -> Array:
        return _largest(*row, k)

    def in_blocks(scores: Array, starts: Array, lengths: Array) -> Array:
        block = min(rows, max(1, _CPU_BLOCK_SCORES // columns))
        return lax.map(one_row, (scores, starts, lengths), batch_size=block)

    def at_once(scores: Array, starts: Array, lengths: Array) -> Array:
        return jax.vmap(one_row)((scores, starts, lengths))

    return lax.platform_dependent(scores, starts, lengths, cpu=in_blocks, default=at_once)


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
