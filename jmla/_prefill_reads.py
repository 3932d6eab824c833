"""How a prefill on Hopper reads a cache of few bits: its rows in place, or bf16 copies made first.

The kernels that read such rows convert them for every query that names them. Those for bf16 rows
are faster from 64 heads on, and copies of all tokens that a batch can see are made once: it is the
shapes of a call that decide. Keys are the same either way, up to the rounding of values with
arbitrary scales to bf16.
"""

import math
from typing import NamedTuple

from jmla.layouts.base import KVLayout

_BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
_RAW = KVLayout.FP8_NOPE_FP8_ROPE


class _Times(NamedTuple):
    """Nanoseconds on an H200.

    Attributes:
        in_place: a query of 2048 keys, with at most 16, 32 and 64 heads and with each 64.
        copy: a row of 512 + 64 values, and the bf16 row that is written.
    """

    in_place: tuple[int, int, int, int]
    copy: float


_TIMES = {
    _BLOCK: _Times((351, 427, 611, 585), 1.0),
    _RAW: _Times((312, 374, 552, 542), 1.0),
    KVLayout.FP4: _Times((421, 476, 676, 665), 1.8),
}
LAYOUTS = tuple(_TIMES)
"""Those that can be read in both ways."""

_BF16 = 440  # a query of 2048 keys in bf16, with each 64 heads or part of them
_LAUNCHES = 10_000  # of what makes the copies


def gathers(layout: KVLayout, heads: int, tokens: int, topk: int, rows: int) -> bool:
    """Whether a call makes copies first.

    They must be estimated to save time, and take no more memory than the queries.

    Args:
        layout: of the cache.
        heads: of a query.
        tokens: query tokens of the call.
        topk: positions that each is given.
        rows: that would be copied: all that the page table can name.
    """
    if layout not in _TIMES or rows > tokens * heads:
        return False
    copies = _LAUNCHES + rows * _TIMES[layout].copy
    return tokens * topk / 2048 * _saved(layout, heads) > copies


def first_gathering(layout: KVLayout, heads: int, topk: int, rows: int) -> int | None:
    """How many query tokens a call needs at least to make copies; None if no number does."""
    if layout not in _TIMES or _saved(layout, heads) <= 0:
        return None
    copies = _LAUNCHES + rows * _TIMES[layout].copy
    faster = math.floor(copies * 2048 / topk / _saved(layout, heads)) + 1
    return max(faster, math.ceil(rows / heads))


def _saved(layout: KVLayout, heads: int) -> float:
    """Nanoseconds of a query of 2048 keys, copies left out; negative if in place is faster."""
    *few, each = _TIMES[layout].in_place
    tiles = math.ceil(heads / 64)
    in_place = each * tiles
    if tiles == 1:
        in_place = next(t for t, most in zip(few, (16, 32, 64), strict=True) if heads <= most)
    return in_place - _BF16 * tiles
