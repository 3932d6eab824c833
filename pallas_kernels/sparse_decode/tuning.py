"""What one launch computes, and how: everything that is known before the kernel is compiled."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.device.row_formats import COLUMNS, RANK, TILE, RowFormat

HEAD_TILES = (16, 32, 64)
SHARED_BYTES = 231424  # that one block may use, in pieces of 1024
SLOTS = 132  # blocks that run at once: one on each multiprocessor
MAX_SPLITS = 32
REGISTERS = 512  # of each of 128 threads: 65536 in all


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a narrow block works.

    Attributes:
        heads: of the query that one block serves: 16, 32 or 64.
        stages: of the ring of rows in shared memory.
        rows: of a stage: 32 or 64.
        registers: per thread of the warpgroups scores, values (each of two), gather; multiples of
            8. More in sum than exist would stop the kernel for ever.
        eager: scores reads its operands further ahead, for more registers.
    """

    heads: int
    stages: int
    rows: int
    registers: tuple[int, int, int]
    eager: bool

    def __post_init__(self) -> None:
        scores, values, gather = self.registers
        if scores + 2 * values + gather > REGISTERS or any(r % 8 for r in self.registers):
            raise ValueError(f"{self.registers=}: expected multiples of 8, in sum {REGISTERS=}")
        if self.heads not in HEAD_TILES or self.rows not in (TILE // 2, TILE):
            raise ValueError(f"{self.heads=} {self.rows=}: expected one of {HEAD_TILES}, 32 or 64")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One launch.

    Attributes:
        n: queries.
        heads: of each.
        topk: slots that each query names.
        num_slots: rows of the cache.
        splits: parts of the keys.
        final: whether the result is bf16, and not f32 that is yet to be joined.
        has_lengths: whether each query has a length of its own.
        has_sink: whether each head has a sink; for final results only.
        has_scale: whether the cache has one scale for all of its values.
        has_max_logits: whether each head's largest logit is a result.
        pages: the slots and the bytes of a page, if rows lie in pages, or None.
    """

    n: int
    heads: int
    topk: int
    num_slots: int
    splits: int
    final: bool
    has_lengths: bool
    has_sink: bool
    has_scale: bool
    has_max_logits: bool
    pages: tuple[int, int] | None

    @property
    def blocks(self) -> int:
        """Blocks of 64 keys."""
        return math.ceil(self.topk / TILE)

    @property
    def blocks_per_split(self) -> int:
        """Blocks of one part."""
        return math.ceil(self.blocks / self.splits)


def tuning_for(row_format: RowFormat, heads: int) -> Tuning:
    """The tuning for narrow blocks of `heads` heads, from measurements on an H200."""
    if row_format.nope_bytes > 512:  # two stages of 64 rows are too coarse
        return Tuning(heads, 5, 32, (128, 152, 80), eager=True)
    if row_format.rope_is_value:
        if heads == 64:
            return Tuning(64, 3, 64, (120, 176, 40), eager=False)
        return Tuning(heads, 4 if heads == 16 else 3, 64, (128, 152, 80), eager=True)
    if row_format.nope_bytes < 512:
        if heads == 64:
            return Tuning(64, 5, 64, (112, 176, 48), eager=False)
        return Tuning(heads, 6, 64, (128, 152, 80), eager=True)
    return Tuning(heads, 4, 64, (128, 152, 80), eager=True)


class Choice(NamedTuple):
    """How a launch divides its work.

    Attributes:
        wide: which kind of block.
        heads: that one block serves.
        splits: parts of the keys.
    """

    wide: bool
    heads: int
    splits: int


# Microseconds on an H200: a block of keys by heads of a block, what a launch takes besides, what
# joining the parts takes besides the bytes, and bytes per microsecond then.
_NARROW_KEY_BLOCK = {16: 1.4, 32: 1.75, 64: 2.7}
_WIDE_KEY_BLOCK = 2.5
_LAUNCH = 5.0
_JOIN = 1.5
_JOIN_RATE = 2.4e6
WIDE_HEADS = 64


def has_wide_blocks(row_format: RowFormat) -> bool:
    """Whether wide blocks read rows of the format."""
    return row_format.parts * COLUMNS == RANK and row_format.scale_columns >= COLUMNS


def choose(
    row_format: RowFormat,
    n: int,
    heads: int,
    topk: int,
    num_splits: int | None,
    most: int = MAX_SPLITS,
    tiles: Sequence[int] = HEAD_TILES,
) -> Choice:
    """The choice of the shortest estimated time, of at most `most` parts.

    Narrow blocks have the heads of one of `tiles`.

    The parts change the rounding of a result and so does the kind of block, the heads of a narrow
    block do not. With `num_splits` given, the kind follows from the format and from whether there
    are more than 32 heads: a query's bits then depend on nothing but its own arguments.
    """
    blocks = math.ceil(topk / TILE)
    if num_splits is None:
        candidates = range(1, min(blocks, most) + 1)
        parts = [s for s in candidates if math.ceil(blocks / math.ceil(blocks / s)) == s]
    else:
        parts = [min(num_splits, blocks, most)]
    narrow = [(False, tile) for tile in tiles]
    small = [(False, tile) for tile in tiles if tile < WIDE_HEADS]
    if not has_wide_blocks(row_format):
        kinds = narrow
    elif heads <= HEAD_TILES[-2]:
        kinds = small
    elif num_splits is None:
        kinds = [*small, (True, WIDE_HEADS)]
    else:
        kinds = [(True, WIDE_HEADS)]
    choices = [Choice(*kind, splits) for splits in parts for kind in kinds]
    return min(choices, key=lambda choice: _estimate(n, heads, blocks, choice))


def _estimate(n: int, heads: int, blocks: int, choice: Choice) -> float:
    waves = math.ceil(n * math.ceil(heads / choice.heads) * choice.splits / SLOTS)
    key_block = _WIDE_KEY_BLOCK if choice.wide else _NARROW_KEY_BLOCK[choice.heads]
    time = waves * (_LAUNCH + math.ceil(blocks / choice.splits) * key_block)
    if choice.splits > 1:
        time += _JOIN + 2 * 4 * 512 * n * heads * choice.splits / _JOIN_RATE
    return time
