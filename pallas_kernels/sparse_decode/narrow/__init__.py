"""Blocks of 16 to 64 heads: keys are the rows of both products.

So few heads cost little. Rows are converted in registers, once as keys and once as values, and
never stored converted.
"""

import functools

from pallas_kernels.device.row_formats import RowFormat
from pallas_kernels.sparse_decode.narrow.block import Block, shared_bytes
from pallas_kernels.sparse_decode.narrow.gather import gather
from pallas_kernels.sparse_decode.narrow.scores import scores
from pallas_kernels.sparse_decode.narrow.values import values
from pallas_kernels.sparse_decode.program import Program
from pallas_kernels.sparse_decode.task import KeySource
from pallas_kernels.sparse_decode.tuning import Tuning

__all__ = ["program"]


def program(row_format: RowFormat, tuning: Tuning, keys: KeySource | None = None) -> Program:
    """The program for rows of a format; without `keys`, a list for each query."""
    for_scores, for_values, for_gather = tuning.registers
    return Program(
        tuning.heads,
        shared_bytes(row_format, tuning, keys),
        functools.partial(Block, row_format, tuning, keys),
        [
            (for_scores, scores),
            (for_values, functools.partial(values, half=0)),
            (for_values, functools.partial(values, half=1)),
            (for_gather, gather),
        ],
        begin=Block.take_row,
    )
