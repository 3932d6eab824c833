"""Bringing the query and the named rows into shared memory, by a warpgroup of scores."""

from collections.abc import Sequence

from pallas_kernels.device import wgmma
from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.memory import (
    CHUNK,
    KEPT,
    READ_ONCE,
    copied_bytes,
    copy,
    global_address,
    load_global,
    prefetch,
    store_shared,
)
from pallas_kernels.device.row_formats import TILE
from pallas_kernels.device.simt import Value, ballot, i32, minimum, ptx, select, shuffle, when
from pallas_kernels.sparse_decode.task import Task, row_or_first
from pallas_kernels.sparse_prefill.block import MEMORY, Block
from pallas_kernels.sparse_prefill.tuning import COLUMN_TILE, GROUPS, HEADS, LANDINGS, PARTS, WARPS

LANES = 8  # that copy a row together
ROWS = 4  # that a warp copies at once
ROWS_OF_WARP = TILE // WARPS
ROW_BYTES = FORMATS["bf16"].width * 2


class Copier:
    """What one warpgroup of scores copies: its stage's keys, and its half of the query."""

    def __init__(self, block: Block, group: int) -> None:
        self.block, self.thread, self.group = block, block.thread, group
        self.lane, self.own = self.thread.lane & (LANES - 1), self.thread.lane >> 3

    def slot(self, query: Value, length: Value, number: Value) -> Value:
        """The slot of this lane's row of a block of keys; -1 is masked, and what is no row."""
        shape, row = self.block.shape, self.thread.lane & (ROWS_OF_WARP - 1)
        place = number * TILE + self.thread.warp * ROWS_OF_WARP + row
        indices = global_address(self.block.arrays["indices"]) + query.wide() * (4 * shape.topk)
        (slot,) = load_global(indices + minimum(place, shape.topk - 1).wide() * 4, "r")
        return select((place < length) & slot.below(shape.num_slots), slot, i32(-1))

    def copy_keys(self, slot: Value) -> None:
        """Begins to copy the rows in the slots of all lanes; zeros for those that are masked."""
        block = self.block
        latents = global_address(block.arrays["latents"])
        first = 0
        for end in LANDINGS:
            for step in range(ROWS_OF_WARP // ROWS):
                row = self.own + ROWS * step
                named = shuffle(slot, row)
                source = latents + row_or_first(named).wide() * ROW_BYTES
                place = self.thread.warp * ROWS_OF_WARP + row
                parts, size = range(first, end), copied_bytes(named)
                self._copy_row(block.tile(self.group), place, source, size, parts, KEPT)
            ptx("cp.async.commit_group;")
            first = end
        rows = ballot(slot < 0) & ((1 << ROWS_OF_WARP) - 1)
        place = block.small + self.thread.warp * 4
        when(
            self.thread.lane.equals(0),
            lambda: store_shared(place, [rows], MEMORY.masked + 4 * WARPS * self.group),
        )

    def refill(self, slot: Value, used: Value) -> None:
        """`copy_keys` as soon as what this warp has copied before is no longer needed.

        Args:
            slot: see there.
            used: how often the stage has been, before.
        """
        place = self.thread.warp + self.group * WARPS
        self.block.empty.wait(place, used & 1)
        self.copy_keys(slot)

    def copy_query(self, task: Task) -> None:
        """Begins to copy half of the heads, with zeros for those that do not exist."""
        block, own = self.block, HEADS // GROUPS // WARPS
        heads = global_address(block.arrays["q"])
        heads = heads + task.row.wide() * (block.shape.heads * ROW_BYTES)
        for step in range(own // ROWS):
            row = self.thread.warp * own + self.own + (HEADS // GROUPS * self.group + ROWS * step)
            head = task.first_head + row
            named = select(head < block.shape.heads, head, i32(-1))
            source = heads + row_or_first(named).wide() * ROW_BYTES
            size, parts = copied_bytes(named), range(PARTS + 1)
            self._copy_row(block.query, row, source, size, parts, READ_ONCE)
        block.query_full.arrive_on_copies(0)

    def prefetch_query(self, task: Task) -> None:
        """Begins to bring it to L2, as far as it is what this warpgroup will copy."""
        block = self.block
        first = task.first_head + HEADS // GROUPS * self.group
        count = minimum(i32(block.shape.heads) - first, HEADS // GROUPS)
        row = task.row.wide() * block.shape.heads + first.wide()
        source = global_address(block.arrays["q"]) + row * ROW_BYTES
        when(self.thread.index.equals(0) & (count > 0), lambda: prefetch(source, count * ROW_BYTES))

    def _copy_row(
        self,
        tile: Value,
        row: Value,
        source: Value,
        size: Value,
        parts: Sequence[int],
        policy: int,
    ) -> None:
        """This lane's chunks of some tiles of a row."""
        place = tile + row * wgmma.ROW_BYTES + ((self.lane ^ (row & 7)) << 4)
        source = source + (self.lane * CHUNK).wide()
        for part in parts:
            copy(place + part * COLUMN_TILE, source + part * wgmma.ROW_BYTES, size, policy)
