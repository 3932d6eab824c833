"""The warpgroup that brings queries and keys into shared memory, and fills what no query sees."""

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import (
    CHUNK,
    WORD,
    copied_bytes,
    copy,
    copy_word,
    load_global,
    store_shared_where,
)
from pallas_kernels.device.simt import (
    WARP,
    WARPGROUP,
    Value,
    branch,
    f32,
    i32,
    i64,
    loop,
    maximum,
    minimum,
    opaque,
    ptx,
    select,
    shuffle,
    when,
)
from pallas_kernels.device.sync import Ring
from pallas_kernels.indexer_logits.block import Block
from pallas_kernels.indexer_logits.schedule import Group, Schedule, Share
from pallas_kernels.indexer_logits.shape import SCALE_BYTES, UNIT
from pallas_kernels.indexer_logits.tuning import QUERY_SLOTS, TILE

_CHUNKS = wgmma.ROW_BYTES // CHUNK
_FILLED = 16  # stores of a thread for one row at a time


class Copier:
    """What the threads of the warpgroup do: each has a key of a tile, and chunks of others."""

    def __init__(self, block: Block) -> None:
        self.block, self.thread = block, block.thread
        self.lanes = block.shape.row_bytes // CHUNK  # that copy a row together
        self.rows = WARP // self.lanes  # that a warp copies at once
        self.chunk, self.row = self.thread.lane & (self.lanes - 1), self.thread.lane // self.lanes
        # Rows of shared memory have 8 chunks: those behind are in rows of their own.
        self.half, self.place = self.chunk // _CHUNKS, self.chunk % _CHUNKS

    def page_entry(self, group: Group, tile: Value) -> Value:
        """Where the page table has the page of this thread's key, or of the last one there is."""
        shape = self.block.shape
        assert shape.max_pages is not None
        page = (tile * TILE + self.thread.index) // shape.keys.page_size
        place = group.request.wide() * shape.max_pages + minimum(page, shape.max_pages - 1).wide()
        return self.block.array("page_table") + place * 4

    def page(self, group: Group, tile: Value) -> Value:
        """The page of this thread's key; it may be any number where no query sees the key."""
        if self.block.shape.max_pages is None:
            return i32(0)
        return load_global(self.page_entry(group, tile), "r")[0]

    def copy_tile(self, group: Group, tile: Value, page: Value, stage: Value) -> None:
        """Begins to copy a tile's keys, their scales and pages; zeros for those that are not seen.

        Args:
            group: whose the tile is.
            tile: its number.
            page: of this thread's key.
            stage: where the tile goes.
        """
        shape, shared, keys = self.block.shape, self.block.shared, self.block.shape.keys
        position = tile * TILE + self.thread.index
        seen = (position < group.end) & page.below(keys.pages)
        page, row = select(seen, page, i32(0)), select(seen, position % keys.page_size, i32(0))
        units = page * (keys.page_bytes // UNIT) + row * (shape.row_bytes // UNIT)
        units = select(seen, units, i32(-1))
        first_row = self.thread.warp * WARP
        place = shared["tiles"] + stage * self.block.tuning.tile_bytes
        place = place + (self.half * TILE + first_row) * wgmma.ROW_BYTES
        source = self.block.array("keys") + (self.chunk * CHUNK).wide()
        for step in range(WARP // self.rows):
            own = self.row + self.rows * step
            named = shuffle(units, own)
            copy(
                place + own * wgmma.ROW_BYTES + ((self.place ^ (own & 7)) << 4),
                source + maximum(named, 0).wide() * UNIT,
                copied_bytes(named),
            )
        word = (stage * TILE + self.thread.index) * WORD
        size = select(seen, i32(WORD), i32(0))
        if not shape.bf16:
            copy_word(shared["scales"] + word, self._scale(page, row), size)
        if shape.max_pages is not None:
            copy_word(shared["pages"] + word, self.page_entry(group, tile), i32(WORD))

    def _scale(self, page: Value, row: Value) -> Value:
        keys = self.block.shape.keys
        if not keys.packed:
            return self.block.array("scales") + (page * keys.page_size + row).wide() * SCALE_BYTES
        behind = self.block.array("keys") + keys.page_size * self.block.shape.dim
        return behind + page.wide() * keys.page_bytes + (row * SCALE_BYTES).wide()

    def copy_queries(self, group: Group, slot: Value) -> None:
        """Begins to copy the heads of a group's queries, with zeros for those there are not."""
        shape, tuning = self.block.shape, self.block.tuning
        place = self.block.shared["queries"] + slot * tuning.query_bytes
        place = place + self.half * (tuning.query_rows * wgmma.ROW_BYTES)
        rows = WARPGROUP // self.lanes
        own = self.thread.index // self.lanes
        for step in range(-(-tuning.group * tuning.padded_heads // rows)):
            row = own + rows * step
            query, head = row // tuning.padded_heads, row % tuning.padded_heads
            named = (query < group.size) & (head < shape.heads)
            index = select(named, (group.query + query) * shape.heads + head, i32(0))
            copy(
                place + row * wgmma.ROW_BYTES + ((self.place ^ (row & 7)) << 4),
                self.block.array("q")
                + index.wide() * shape.row_bytes
                + (self.chunk * CHUNK).wide(),
                select(named, i32(CHUNK), i32(0)),
            )

    def fill(self, schedule: Schedule) -> None:
        """-inf in the tiles that no query of a group sees, a share of them by each block."""
        shape, block = self.block.shape, self.block
        width = 4 if shape.columns % 4 == 0 else 1
        size = WARPGROUP * width * _FILLED
        parts = -(-shape.columns // size)
        pieces = block.tuning.groups(shape) * parts
        blocks = block.tuning.blocks(shape)

        def one(i: Value) -> list[Value]:
            piece = block.number + i * blocks
            group = schedule.group(piece // parts)
            first = (piece % parts) * size
            start, end = group.first * TILE, (group.first + group.tiles) * TILE
            end = select(end > start, end, start)
            whole = (start < first + 1) & (end >= minimum(first + size, shape.columns))

            def row(query: Value) -> list[Value]:
                line = block.array("out") + (group.query + query).wide() * i64(4 * shape.columns)
                # Opaque, or the places of all columns would be kept in registers.
                begin = opaque(first + self.thread.index * width)
                for step in range(_FILLED):
                    column = begin + WARPGROUP * step * width
                    outside = (column < start) | (column >= end)
                    infinite = [f32(float("-inf")).as_i32()] * width
                    store_shared_where(
                        outside & (column < shape.columns),
                        line + column.wide() * 4,
                        infinite,
                        space="global",
                    )
                return []

            def rows() -> None:
                loop(0, group.size, [], row)

            when(whole ^ 1, rows)
            return []

        loop(0, (i32(pieces + blocks - 1) - block.number) // blocks, [], one)


def copier(block: Block) -> None:
    """Copies all tiles of this block, as stages become free, and fills the rest of the result."""
    copies, schedule = Copier(block), Schedule(block)

    def one(share: Share, carry: list[Value]) -> list[Value]:
        group, lower, upper = share

        def begin() -> list[Value]:
            slot = Ring(QUERY_SLOTS, *carry[2:])
            block.query_empty.wait(slot.slot, slot.phase ^ 1)
            copies.copy_queries(group, slot.slot)
            block.query_full.arrive_on_copies(slot.slot)
            return slot.next().values()

        def step(tile: Value, page: Value, *place: Value) -> list[Value]:
            following = copies.page(group, minimum(tile + 1, upper - 1))
            ring = Ring(block.tuning.stages, *place)
            block.empty.wait(ring.slot, ring.phase ^ 1)
            copies.copy_tile(group, tile, page, ring.slot)
            block.full.arrive_on_copies(ring.slot)
            return [following, *ring.next().values()]

        slot = branch(upper > lower, carry[2:], begin)
        _, *stage = loop(lower, upper, [copies.page(group, lower), *carry[:2]], step)
        return [*stage, *slot]

    schedule.for_each([*Ring.start(block.tuning.stages).values(), *Ring.start(2).values()], one)
    if not block.tuning.handed_on:
        copies.fill(schedule)
    ptx("cp.async.wait_all;")
