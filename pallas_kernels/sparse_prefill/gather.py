"""The warpgroup that brings the query and the named rows into shared memory."""

from pallas_kernels.device import wgmma
from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.memory import (
    CHUNK,
    copied_bytes,
    copy,
    global_address,
    load_global,
    prefetch,
    store_shared,
)
from pallas_kernels.device.simt import Value, ballot, i32, loop, minimum, ptx, select, shuffle, when
from pallas_kernels.device.sync import Ring
from pallas_kernels.sparse_decode.task import Task, row_or_first
from pallas_kernels.sparse_decode.tuning import SLOTS
from pallas_kernels.sparse_prefill.block import Block, tasks_of
from pallas_kernels.sparse_prefill.tuning import HEAD_TILE, HEADS, PARTS, WARPS

ROWS = 4  # that a warp copies at once, eight lanes each
ROW_BYTES = FORMATS["bf16"].width * 2


def gather(block: Block) -> None:
    """Fills the stages with the keys of one task after another, ahead of those that use them.

    An index that names no row, or lies beyond the query's length, becomes a row of zeros.
    """
    _Copier(block).run()


class _Copier:
    def __init__(self, block: Block) -> None:
        self.block, self.thread, self.tuning = block, block.thread, block.tuning
        self.lane, self.own = self.thread.lane & 7, self.thread.lane >> 3

    def run(self) -> None:
        block = self.block
        last = tasks_of(block.shape) - 1

        def one(index: Value, carry: list[Value]) -> list[Value]:
            ring, turn = Ring(self.tuning.stages, *carry[:2]), Ring(1, *carry[2:4])
            task = block.task(index)
            block.query_empty.wait(0, turn.phase ^ 1)
            self._copy_query(task)
            # So that neither its queries nor its first indices are far away when they are needed.
            later = block.task(minimum(index + SLOTS, last))
            self._prefetch_query(later)

            def step(number: Value, *carry: Value) -> list[Value]:
                ring, slot = Ring(self.tuning.stages, *carry[:2]), carry[2]
                following = self._slot(task, number + 1)
                block.empty.wait(ring.slot, ring.phase ^ 1)
                self._copy_keys(ring.slot, slot)
                self._store_masked(ring.slot, slot)
                block.full.arrive_warp(ring.slot, self.thread)
                block.full.arrive_on_copies(ring.slot)
                return [*ring.next().values(), following]

            first = self._slot(later, i32(0))
            carry = loop(0, block.stages_of(task), [*ring.values(), carry[4]], step)
            return [*carry[:2], *turn.next().values(), first]

        first = self._slot(block.task(block.number), i32(0))
        start = [*Ring.start(self.tuning.stages).values(), *Ring.start(1).values(), first]
        block.for_each_task(start, one)
        ptx("cp.async.wait_all;")

    def _slot(self, task: Task, number: Value) -> Value:
        """The slot of this lane's row of a stage's keys; -1 is masked, and what is no row."""
        shape, rows = self.block.shape, self.tuning.rows_of_warp
        row = self.thread.lane & 15
        place = number * self.tuning.keys + self.thread.warp * rows + row
        indices = global_address(self.block.arrays["indices"])
        indices = indices + task.row.wide() * (4 * shape.topk)
        (slot,) = load_global(indices + minimum(place, shape.topk - 1).wide() * 4, "r")
        used = (place < task.length()) & (row < rows)
        return select(used & slot.below(shape.num_slots), slot, i32(-1))

    def _copy_keys(self, stage: Value, slot: Value) -> None:
        tile = self.block.tile(stage)
        latents = global_address(self.block.arrays["latents"])
        for step in range(self.tuning.rows_of_warp // ROWS):
            row = self.own + ROWS * step
            named = shuffle(slot, row)
            source = latents + row_or_first(named).wide() * ROW_BYTES
            place = self.thread.warp * self.tuning.rows_of_warp + row
            self._copy_row(tile, place, source, copied_bytes(named), self.tuning.column_tile)

    def _copy_query(self, task: Task) -> None:
        """What of it stays in shared memory, and zeros for heads that do not exist."""
        block, held = self.block, self.tuning.held
        heads = global_address(block.arrays["q"])
        heads = heads + task.row.wide() * (block.shape.heads * ROW_BYTES)
        for step in range(HEADS // WARPS // ROWS):
            row = self.thread.warp * (HEADS // WARPS) + self.own + ROWS * step
            head = task.first_head + row
            named = select(head < block.shape.heads, head, i32(-1))
            source = heads + row_or_first(named).wide() * ROW_BYTES
            self._copy_row(block.query, row, source, copied_bytes(named), HEAD_TILE, first=held)
        block.query_full.arrive_on_copies(0)

    def _copy_row(
        self,
        tile: Value,
        row: Value,
        source: Value,
        size: Value,
        column_tile: int,
        *,
        first: int = 0,
    ) -> None:
        """This lane's chunks of a row, from its column tile `first` on."""
        place = tile + row * wgmma.ROW_BYTES + ((self.lane ^ (row & 7)) << 4)
        source = source + (self.lane * CHUNK).wide()
        for part in range(first, PARTS + 1):
            offset = (part - first) * column_tile
            copy(place + offset, source + part * wgmma.ROW_BYTES, size)

    def _prefetch_query(self, task: Task) -> None:
        block = self.block
        count = minimum(i32(block.shape.heads) - task.first_head, HEADS)
        row = task.row.wide() * block.shape.heads + task.first_head.wide()
        source = global_address(block.arrays["q"]) + row * ROW_BYTES
        when(self.thread.index.equals(0), lambda: prefetch(source, count * ROW_BYTES))

    def _store_masked(self, stage: Value, slot: Value) -> None:
        """The set of this warp's rows that are masked."""
        block = self.block
        rows = ballot(slot < 0) & ((1 << self.tuning.rows_of_warp) - 1)
        place = block.small + (stage * WARPS + self.thread.warp) * 4
        when(
            self.thread.lane.equals(0),
            lambda: store_shared(place, [rows], block.memory.masked),
        )
