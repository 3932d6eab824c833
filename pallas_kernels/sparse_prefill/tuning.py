"""What a block of sparse prefill is made of, and when its blocks are the faster ones."""

import math

from pallas_kernels.device import wgmma
from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.row_formats import COLUMNS, RANK, TILE
from pallas_kernels.sparse_decode.tuning import SLOTS, choose, estimate

HEADS = 64
GROUPS = 2  # warpgroups of scores, each with a stage of its own
WARPS = 4  # of a warpgroup
PARTS = RANK // COLUMNS  # tiles of 64 no-position columns; the next tile is the rotary one
COLUMN_TILE = TILE * wgmma.ROW_BYTES  # bytes of 64 columns of 64 rows, keys or heads
ROPE_TILE = PARTS * COLUMN_TILE
STAGE_BYTES = (PARTS + 1) * COLUMN_TILE
# Fewer for values, and the compiler runs their products one at a time.
SCORES_REGISTERS, VALUES_REGISTERS = 96, 160

# Microseconds on an H200: a block of keys, and what a task and a launch take besides.
_KEY_BLOCK = 1.85
_TASK = 2.0
_LAUNCH = 5.0


def is_for_own_blocks(row_format: str, n: int, heads: int, topk: int) -> bool:
    """Whether these blocks are estimated to be faster than those of the decode kernel.

    They read bf16 rows, do not split a query's keys, and take as long for one head as for 64.
    """
    if row_format != "bf16":
        return False
    rounds = math.ceil(n * math.ceil(heads / HEADS) / SLOTS)
    own = _LAUNCH + rounds * (_TASK + math.ceil(topk / TILE) * _KEY_BLOCK)
    choice = choose(FORMATS[row_format], n, heads, topk, None)
    return own < estimate(n, heads, topk, choice)
