"""Blocks of 64 heads: heads are the rows of both products.

Their right operands, keys and values, are the same rows in shared memory, which are stored there
as the tensor cores take them: bf16 rows as they are, e4m3 rows converted to f16. Of 128 heads two
blocks convert half of the rows each, and store them for both.
"""

import functools
import math

from pallas_kernels.device.row_formats import RowFormat
from pallas_kernels.sparse_decode.program import Program
from pallas_kernels.sparse_decode.task import KeySource
from pallas_kernels.sparse_decode.tuning import WIDE_HEADS
from pallas_kernels.sparse_decode.wide.block import PAIR, Block, is_converted, shared_bytes
from pallas_kernels.sparse_decode.wide.gather import gather
from pallas_kernels.sparse_decode.wide.scores import scores
from pallas_kernels.sparse_decode.wide.values import values

__all__ = ["program"]


def program(row_format: RowFormat, heads: int, keys: KeySource | None = None) -> Program:
    """The program for rows of a format and queries of some number of heads.

    Without `keys` each query has a list of them.
    """
    # Rows without block scales, which are less to convert, were no faster in pairs.
    paired = row_format.block_scales and math.ceil(heads / WIDE_HEADS) % PAIR == 0
    # Fewer for values, and the compiler runs their products one at a time.
    for_values = 160
    for_scores, for_gather = 112, 80
    if is_converted(row_format):
        for_scores, for_gather = (136, 56) if paired else (128, 64)
    return Program(
        WIDE_HEADS,
        shared_bytes(row_format, keys, paired=paired),
        functools.partial(Block, row_format, paired, keys),
        [
            (for_scores, scores),
            (for_values, functools.partial(values, half=0)),
            (for_values, functools.partial(values, half=1)),
            (for_gather, gather),
        ],
        cluster=PAIR if paired else 1,
        begin=Block.take_row,
    )
