"""Wide blocks whose bf16 rows the copy engine brings: 16 at a time lie side by side in a page."""

import dataclasses
import math

from pallas_kernels.device import wgmma
from pallas_kernels.device.boxes import Box, copy_box
from pallas_kernels.device.row_formats import COLUMNS, TILE, RowFormat
from pallas_kernels.device.simt import Value, any_lane, either, shuffle, when
from pallas_kernels.sparse_decode import wide
from pallas_kernels.sparse_decode.program import Program
from pallas_kernels.sparse_decode.task import KeySource
from pallas_kernels.sparse_decode.tuning import WIDE_HEADS
from pallas_kernels.sparse_decode.wide.block import COLUMN_TILE, PARTS, Block, is_converted
from pallas_kernels.sparse_decode.wide.gather import Copier

TILES = PARTS + 1  # of 64 columns
WARP_ROWS = 16


def serves(row_format: RowFormat, page_size: int) -> bool:
    """Whether rows are bf16 and those of a warp are neighbours."""
    return not is_converted(row_format) and math.gcd(page_size, TILE) % WARP_ROWS == 0


def program(row_format: RowFormat, keys: KeySource) -> Program:
    """The program for rows of a format that `serves` names."""
    found = wide.program(row_format, WIDE_HEADS, keys)
    *others, (registers, _) = found.roles
    return dataclasses.replace(found, roles=[*others, (registers, _gather)])


def _gather(block: Block) -> None:
    """Fills the stages with the rows of all blocks of keys."""
    _Boxes(block).run()


class _Boxes(Copier):
    """Rows that are masked, or lie beside one that is, are copied one by one."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        nope = block.format.nope
        self.box = Box(WARP_ROWS, value_bytes=2, row_bytes=nope.stride)
        self.box_map = block.arrays.box_map(nope.array, self.box)

    def bring(self, slots: list[Value], slot: Value) -> None:
        """See `Copier.bring`."""
        masked = any_lane((slots[0] < 0) | (slots[1] < 0))
        either(
            masked,
            0,
            lambda: super(_Boxes, self).bring(slots, slot),
            lambda: self._copy_boxes(slots[0], slot),
        )

    def _copy_boxes(self, own: Value, slot: Value) -> None:
        """By a lane for each 64 columns."""
        block, lane = self.block, self.thread.lane
        first = shuffle(own, 0)
        when(lane.equals(0), lambda: block.full.expect(slot, TILES * self.box.bytes))
        rows = block.tile(slot) + self.thread.warp * (WARP_ROWS * wgmma.ROW_BYTES)

        def begin() -> None:
            place = rows + lane * COLUMN_TILE
            copy_box(place, self.box_map, lane * COLUMNS, first, block.full.at(slot))

        when(lane < TILES, begin)
