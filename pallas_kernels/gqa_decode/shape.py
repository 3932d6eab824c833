"""What one launch computes, and how: everything that is known before the kernel is compiled."""

import dataclasses
import math

WARPS = 4
MMA_ROWS = 16
HEAD_DIMS = (64, 128)
MAX_GROUP = 64
MAX_SPLITS = 128
SLOTS = 2 * 132  # blocks that run at once: two on each multiprocessor
_RING_BYTES = 98304  # that one of two blocks may use, beside little else
_MOST_STAGES = 5


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a block works.

    Attributes:
        tiles: of 16 rows of queries: 1 or 2.
        keys: that a warp takes at a time: 16 or 32.
        stages: of a warp's ring of keys in shared memory.
    """

    tiles: int
    keys: int
    stages: int

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
    keys = 16 if stored_bytes > 256 else 32
    stages = min(_MOST_STAGES, _RING_BYTES // (WARPS * keys * stored_bytes))
    return Tuning(1 if rows <= MMA_ROWS else 2, keys, stages)


# Lengths are not known when a kernel is compiled, and a table for the longest of all requests tells
# little: parts are weighed at this length.
_USUAL_LENGTH = 32768
# Of one block on an H200 that runs as many as it can: bytes per microsecond, what a block and a
# launch take besides, and what joining the parts takes.
_RATE = 14800.0
_BLOCK = 4.0
_JOIN = 3.0
_JOIN_RATE = 3e6


def choose_splits(
    shape_rows: int, blocks: int, longest: int, stored_bytes: int, head_dim: int, unit: int
) -> int:
    """The parts of the shortest estimated time.

    Args:
        shape_rows: rows of all queries and heads.
        blocks: of a launch that cuts nothing.
        longest: positions that a request's table holds.
        stored_bytes: of a key and its value.
        head_dim: values of a key.
        unit: keys that a block takes at a time.
    """
    units = math.ceil(min(longest, _USUAL_LENGTH) / unit)

    def estimate(splits: int) -> float:
        waves = math.ceil(blocks * splits / SLOTS)
        time = waves * (_BLOCK + math.ceil(units / splits) * unit * stored_bytes / _RATE)
        if splits > 1:
            time += _JOIN + 2 * 4 * head_dim * shape_rows * splits / _JOIN_RATE
        return time

    return min(range(1, min(units, MAX_SPLITS) + 1), key=estimate)
