"""How rows are spread over warps and blocks: measured on an H200."""

from typing import NamedTuple

from pallas_kernels.cache_codec.e4m3 import TensorPart
from pallas_kernels.cache_codec.formats import Format
from pallas_kernels.cache_codec.parts import BF16Part

# Up to here a row's latency counts, and rows are spread as far as they go.
_FEW_ROWS = 4096


class Spread(NamedTuple):
    """How many rows a warp takes, a power of two, and how many warpgroups a block has."""

    rows: int
    warpgroups: int


def spread(source: Format, target: Format, rows: int) -> Spread:
    """That for rows of one format that become rows of another."""
    if rows <= _FEW_ROWS or any(part.whole_rows for part in source.parts):
        return Spread(1, 1)
    # bf16 fills the loads of a lane, and so does nothing else; the divisor of a tensor's scale is
    # made once for all rows of a warp.
    bf16 = all(isinstance(part, BF16Part) for part in source.parts)
    divided = any(isinstance(part, TensorPart) and part.scale for part in target.parts)
    return Spread(4 if bf16 or divided else 2, 1)
