"""How a launch of dense decode divides its work, from what is known before it is compiled."""

import dataclasses
import math

from pallas_kernels.dense_decode.boxes import serves
from pallas_kernels.device.row_formats import RANK, TILE, RowFormat
from pallas_kernels.sparse_decode import tuning
from pallas_kernels.sparse_decode.tuning import HEAD_TILES, SLOTS, WIDE_HEADS, Choice, Tuning

MAX_SPLITS = 128
# Lengths are not known then, and a table for the longest of all requests tells little: parts are
# weighed at this length.
USUAL_LENGTH = 32768
# Microseconds on an H200, as in `sparse_decode.tuning`: of wide blocks whose rows come in boxes.
_BOXES_KEY_BLOCK = 1.9
_LAUNCH = 6.0
_JOIN = 3.0
_JOIN_RATE = 3e6


def tuning_for(row_format: RowFormat, heads: int) -> Tuning:
    """That of sparse decode, with the registers that pages take in blocks of 64 heads."""
    found = tuning.tuning_for(row_format, heads)
    return found if heads < WIDE_HEADS else dataclasses.replace(found, registers=(112, 176, 48))


def choose(
    row_format: RowFormat,
    requests: int,
    heads: int,
    longest: int,
    page_size: int,
    num_splits: int | None,
    *,
    masks: bool,
) -> Choice:
    """The choice of the shortest estimated time; see `sparse_decode.tuning.choose`.

    Rows that the copy engine brings are read by wide blocks, however few heads there are: they
    read them faster than narrow ones, and the products of 64 heads take less time than that.

    Args:
        row_format: of the cache.
        requests: of the batch.
        heads: of all tokens of a request.
        longest: positions that a request's table holds.
        page_size: positions of a page.
        num_splits: parts of each request, or None.
        masks: whether tokens of one block may attend to different positions, or there is a
            window: narrow blocks of 64 heads have no registers for either.
    """
    usual = longest if num_splits else min(longest, USUAL_LENGTH)
    if not serves(row_format, page_size):
        tiles = HEAD_TILES[:-1] if masks else HEAD_TILES
        return tuning.choose(row_format, requests, heads, usual, num_splits, MAX_SPLITS, tiles)
    blocks = math.ceil(usual / TILE)
    if num_splits:
        return Choice(True, WIDE_HEADS, min(num_splits, blocks, MAX_SPLITS))

    def estimate(splits: int) -> float:
        waves = math.ceil(requests * math.ceil(heads / WIDE_HEADS) * splits / SLOTS)
        time = waves * (_LAUNCH + math.ceil(blocks / splits) * _BOXES_KEY_BLOCK)
        if splits > 1:
            time += _JOIN + 2 * 4 * RANK * requests * heads * splits / _JOIN_RATE
        return time

    splits = min(range(1, min(blocks, MAX_SPLITS) + 1), key=estimate)
    return Choice(True, WIDE_HEADS, splits)
