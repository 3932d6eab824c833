"""Blocks of 64 heads: heads are the rows of both products.

Their right operands, keys and values, are the same rows in shared memory, which are stored there
as the tensor cores take them: bf16 rows as they are, e4m3 rows converted to f16.
"""

import functools

from pallas_kernels.device.row_formats import RowFormat
from pallas_kernels.sparse_decode.program import Program
from pallas_kernels.sparse_decode.tuning import WIDE_HEADS
from pallas_kernels.sparse_decode.wide.block import Block, is_converted, shared_bytes
from pallas_kernels.sparse_decode.wide.gather import gather
from pallas_kernels.sparse_decode.wide.scores import scores
from pallas_kernels.sparse_decode.wide.values import values

__all__ = ["program"]


def program(row_format: RowFormat) -> Program:
    """The program for rows of a format."""
    # Fewer for values, and the compiler runs their products one at a time.
    for_values = 160
    for_scores, for_gather = (128, 64) if is_converted(row_format) else (112, 80)
    return Program(
        WIDE_HEADS,
        shared_bytes(row_format),
        functools.partial(Block, row_format),
        [
            (for_scores, scores),
            (for_values, functools.partial(values, half=0)),
            (for_values, functools.partial(values, half=1)),
            (for_gather, gather),
        ],
    )
