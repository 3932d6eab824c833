"""How a block of sparse prefill works: what is known before the kernel is compiled."""

import dataclasses
import math

from pallas_kernels.device import wgmma
from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.row_formats import COLUMNS, RANK
from pallas_kernels.sparse_decode.tuning import SLOTS, choose, estimate

HEADS = 64
PARTS = RANK // COLUMNS  # tiles of 64 no-position columns; the next tile is the rotary one
WARPS = 4  # of a warpgroup
HEAD_TILE = HEADS * wgmma.ROW_BYTES  # bytes of 64 columns of the query


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The sizes of a block.

    Attributes:
        keys: of a stage, a multiple of 16.
        stages: of keys in shared memory.
        held: tiles of 64 columns of the query that stay in registers, for want of shared memory.
        registers: per thread of the warpgroups scores, values (each of two) and gather.
        ahead: Q K^T of the next keys is issued before the softmax of these.
    """

    keys: int
    stages: int
    held: int
    registers: tuple[int, int, int]
    ahead: bool = True
    fence: bool = True

    @property
    def rows_of_warp(self) -> int:
        """Rows of a stage that one warp copies."""
        return self.keys // WARPS

    @property
    def column_tile(self) -> int:
        """Bytes of 64 columns of a stage."""
        return self.keys * wgmma.ROW_BYTES

    @property
    def rope_tile(self) -> int:
        """Where the rotary values of a stage begin, and later the weights P."""
        return PARTS * self.column_tile

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage."""
        return (PARTS + 1) * self.column_tile


TUNING = Tuning(keys=48, stages=3, held=2, registers=(136, 160, 56))

# Microseconds on an H200: a stage of keys, and what a task takes besides.
_STAGE = 1.4
_TASK = 2.0
_LAUNCH = 5.0


def is_for_own_blocks(row_format: str, n: int, heads: int, topk: int) -> bool:
    """Whether these blocks are estimated to be faster than those of the decode kernel.

    They read bf16 rows, do not split a query's keys, and take as long for one head as for 64.
    """
    if row_format != "bf16":
        return False
    rounds = math.ceil(n * math.ceil(heads / HEADS) / SLOTS)
    own = _LAUNCH + rounds * (_TASK + math.ceil(topk / TUNING.keys) * _STAGE)
    choice = choose(FORMATS[row_format], n, heads, topk, None)
    return own < estimate(n, heads, topk, choice)
