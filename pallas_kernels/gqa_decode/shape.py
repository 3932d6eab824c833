"""What one launch computes, and how: everything that is known before the kernel is compiled."""

import dataclasses
import math

WARPS = 4
MMA_ROWS = 16
MAX_SPLITS = 128
MULTIPROCESSORS = 132
# Of a multiprocessor: what blocks have for their rings, beside the query and what is small.
_RING_BYTES = 200 * 1024
_MOST_STAGES = 5


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a block works.

    Attributes:
        tiles: of 16 rows of queries: 1 or 2.
        keys: that a warp takes at a time: 16 or 32.
        stages: of a warp's ring of keys in shared memory.
        query_in_registers: whether every warp keeps the query there, of one tile.
        blocks: that run at once on a multiprocessor: the registers of its threads and the memory
            must leave room for them.
    """

    tiles: int
    keys: int
    stages: int
    query_in_registers: bool
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of queries of a block."""
        return self.tiles * MMA_ROWS

    @property
    def block_keys(self) -> int:
        """Keys that all warps of a block take at a time."""
        return WARPS * self.keys


@dataclasses.dataclass(frozen=True)
class Shape:
    """One launch.

    A row is one head of one token. The rows of a request that share a head of the cache are
    numbered token by token.

    Attributes:
        requests: of the batch.
        tokens: of a request, at its last positions.
        kv_heads: of the cache.
        group: query heads that share one of them.
        head_dim: values of a key, and of a value.
        num_pages: of the cache.
        page_size: positions of a page.
        max_pages: entries of a request's table.
        causal: whether a token attends to positions up to its own alone.
        splits: parts of a request's positions.
    """

    requests: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int
    num_pages: int
    page_size: int
    max_pages: int
    causal: bool
    splits: int

    @property
    def heads(self) -> int:
        """Of a query."""
        return self.kv_heads * self.group

    @property
    def rows(self) -> int:
        """Of a request and a head of the cache."""
        return self.tokens * self.group

    @property
    def longest(self) -> int:
        """Positions that a request's table holds."""
        return self.max_pages * self.page_size


def tuning_for(stored_bytes: int, rows: int) -> Tuning:
    """The tuning for rows of queries, and keys that take so many bytes with their values."""
    if rows > MMA_ROWS:
        keys = 16 if stored_bytes > 256 else 32
        return Tuning(2, keys, _stages(keys * stored_bytes, 2), False, 2)
    if stored_bytes > 256:
        return Tuning(1, 16, _stages(16 * stored_bytes, 2), True, 2)
    return Tuning(1, 32, _stages(32 * stored_bytes, 3), False, 3)


def _stages(stage_bytes: int, blocks: int) -> int:
    """As many as blocks that run at once have room for."""
    return min(_MOST_STAGES, _RING_BYTES // blocks // (WARPS * stage_bytes))


# Lengths are not known when a kernel is compiled, and a table for the longest of all requests tells
# little: parts are weighed at this length.
_USUAL_LENGTH = 32768
# Of an H200: bytes per microsecond, which it takes most of the blocks that run at once to read;
# what a block takes besides; what joining the parts takes, and each of them.
_RATE = 4.0e6
_SATURATING = 0.75
_BLOCK = 4.0
_JOIN, _JOIN_PART = 3.0, 0.05
_JOIN_RATE = 3e6


def choose_splits(
    rows: int, blocks: int, longest: int, stored_bytes: int, head_dim: int, tuning: Tuning
) -> int:
    """The parts of the shortest estimated time.

    Args:
        rows: of all queries and heads.
        blocks: of a launch that cuts nothing.
        longest: positions that a request's table holds.
        stored_bytes: of a key and its value.
        head_dim: values of a key.
        tuning: of a block.
    """
    unit, slots = tuning.block_keys, tuning.blocks * MULTIPROCESSORS
    units = math.ceil(min(longest, _USUAL_LENGTH) / unit)

    def estimate(splits: int) -> float:
        count = blocks * splits
        own_bytes = math.ceil(units / splits) * unit * stored_bytes
        time = own_bytes * max(count, _SATURATING * slots) / _RATE
        time += _BLOCK * max(1.0, count / slots)
        if splits > 1:
            time += _JOIN + _JOIN_PART * splits + 2 * 4 * head_dim * rows * splits / _JOIN_RATE
        return time

    return min(range(1, min(units, MAX_SPLITS) + 1), key=estimate)
