"""What a block of sparse prefill is made of, and when its blocks are the faster ones."""

import math

from pallas_kernels.device import wgmma
from pallas_kernels.device.row_formats import COLUMNS, RANK, TILE
from pallas_kernels.sparse_decode.tuning import SLOTS

HEADS = 64
GROUPS = 2  # warpgroups of scores, each with a stage of its own
WARPS = 4  # of a warpgroup
PARTS = RANK // COLUMNS  # tiles of 64 no-position columns; the next tile is the rotary one
COLUMN_TILE = TILE * wgmma.ROW_BYTES  # bytes of 64 columns of 64 rows, keys or heads
ROPE_TILE = PARTS * COLUMN_TILE
STAGE_BYTES = (PARTS + 1) * COLUMN_TILE
STEPS = TILE // 16  # of the second product; each has the rows that one warp has copied
SHARES = 4  # of a stage's weights, and the values begin with the first
LANDINGS = (3, 9)  # column tiles of a row that the tensor cores wait for, one time after another
# Fewer for values, and the compiler runs their products one at a time.
SCORES_REGISTERS, VALUES_REGISTERS = 96, 160


def is_for_own_blocks(row_format: str, n: int, heads: int) -> bool:
    """Whether these blocks are faster than those of the decode kernel, from runs on an H200.

    They read bf16 rows, whatever the number of heads. A query's keys are not split among them: of
    fewer tasks than this the decode kernel makes more.
    """
    return row_format == "bf16" and 2 * n * math.ceil(heads / HEADS) > SLOTS
