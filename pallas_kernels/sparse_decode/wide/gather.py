"""The warpgroup that brings the named rows into shared memory, as the tensor cores take them."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import (
    CHUNK,
    copied_bytes,
    copy,
    global_address,
    load_shared,
    store_shared,
)
from pallas_kernels.device.row_formats import (
    COLUMNS,
    TILE,
    Part,
    RowFormat,
    e4m3_pairs,
    fma_f16,
    multiply_bf16,
    multiply_f16,
    pack_bf16,
    pack_f16,
    permute,
)
from pallas_kernels.device.simt import (
    WARPGROUP,
    Value,
    f32,
    i32,
    int_to_float,
    loop,
    opaque,
    ptx,
    select,
    shuffle,
    when,
)
from pallas_kernels.device.sync import Ring, copy_to_block, in_block, proxy_fence, store_in_block
from pallas_kernels.sparse_decode.task import row_or_first
from pallas_kernels.sparse_decode.wide.block import (
    COLUMN_TILE,
    MEMORY,
    PAIR,
    PARTS,
    ROPE_TILE,
    SCALES_BYTES,
    STAGES,
    Block,
    is_converted,
)

ROWS = 2  # of a thread, eight apart; one, if the other block of a pair has the other half
MASKED = 0x0000FF80  # bias -inf, weight 0
# What the other block of a pair stores in a stage for each warp here: eight rows and their tokens.
WARP_BYTES = 8 * (2 * COLUMNS * (PARTS + 1) + 4)
# Columns that set out for the other block when so many parts of a row are converted: as one part is
# copied the next is converted, and every time costs a fence.
SENT_AFTER = {4: (PARTS, 0, 1, 2, 3), 8: (4, 5, 6, 7)}


def gather(block: Block) -> None:
    """Fills the stages with the rows of all blocks of keys.

    A slot that is not in the cache, or not within the query's length, becomes a row of zeros that
    is masked.
    """
    if is_converted(block.format):
        _Converter(block).run()
    else:
        Copier(block).run()


class Rows:
    """Which rows a thread has: eight lie side by side in a warp, four threads each.

    Attributes:
        rows: how many of a thread.
        row: the first.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.thread = block, block.thread
        length = block.length()
        self.first, self.last = block.key_blocks(length)
        end = self.last * TILE
        self.end = select(end < length, end, length)
        self.rows = 1 if block.paired else ROWS
        self.row = self.thread.warp * (8 * self.rows) + self.thread.quad
        if block.paired:
            self.row = self.row + block.rank * (TILE // PAIR)
            # How far away the other block of the pair has everything.
            self.other = in_block(block.small, block.rank ^ 1) - block.small
        self.slot_at = block.keys.slots()

    def slots(self, number: Value) -> list[Value]:
        """The slots of this thread's rows of a block of keys; -1 is masked."""
        rows = range(self.rows)
        return [self.slot_at(number * TILE + self.row + 8 * r, self.end) for r in rows]

    def source(self, part: Part, slot: Value) -> Value:
        """Where a row lies; some row, if the slot is masked."""
        base = global_address(self.block.arrays[part.array]) + part.offset
        return base + self.block.row_offset(part, row_or_first(slot))

    def store_token(self, slots: list[Value], scale: "_Scales | None", r: int, slot: Value) -> None:
        """Keeps what belongs to a row: its bias and the factor that undoes it, both exact in bf16.

        The bias of a row is e of its scales, so that weights P are relative to what they
        contribute, and f16 holds these, too.
        """
        place = self.block.small + slot * (4 * TILE) + opaque(self.row) * 4
        place = place + MEMORY.tokens
        bias = f32(0.0) if scale is None else scale.bias
        weight = f32(1.0) if scale is None else scale.inverse
        word = select(slots[r] < 0, i32(MASKED), pack_bf16(bias, weight))

        def store() -> None:
            store_shared(place, [word], 32 * r)
            if self.block.paired:
                store_in_block(place + self.other, word, self.block.full.at(slot) + self.other)

        when(self.thread.column.equals(0), store)


@dataclasses.dataclass(frozen=True)
class _Scales:
    """The block scales of a row as 2^e times numbers below 2.

    Attributes:
        bias: e.
        inverse: 2^-e.
        relative: the numbers, each twice in f16.
        rest: what f16 leaves of them, twice in f16; None if they are powers of two.
    """

    bias: Value
    inverse: Value
    relative: list[Value]
    rest: list[Value] | None

    @classmethod
    def of(cls, row_format: RowFormat, scales: list[Value]) -> "_Scales":
        """From the bits of the scales."""
        power = row_format.power_of(scales)
        inverse = (i32(254 << 23) - power).as_f32()
        bias = int_to_float((power >> 23) - 127)
        numbers = [scale.as_f32() * inverse for scale in scales]
        pairs = [_twice_f16(x) for x in numbers]
        rest = None
        if not row_format.scales_are_powers:
            rest = [_twice_f16(x - y)[0] for x, (_, y) in zip(numbers, pairs, strict=True)]
        return cls(bias, inverse, [word for word, _ in pairs], rest)


class _Converter(Rows):
    """Rows of e4m3 values: copied as they are stored a block ahead, then stored as f16.

    A thread converts what it has copied itself, so that no barrier is between the two. Blocks of a
    pair convert half of the rows each, and store them in both.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.rope_chunks = block.format.rope_bytes // (4 * CHUNK)  # of a thread and row

    def run(self) -> None:
        """All blocks of keys."""
        block, rows = self.block, self.rows
        slots = self.slots(self.first)
        for r in range(rows):
            self._copy_scales_and_rope(slots, r)
            for part in range(PARTS):
                self._copy_part(slots, r, part)
            ptx("cp.async.commit_group;")

        block.meet()

        def step(number: Value, *carry: Value) -> list[Value]:
            ring, now = Ring(STAGES, *carry[:2]), list(carry[2 : 2 + rows])
            following = list(carry[2 + rows :])
            later = self.slots(number + 2)
            block.empty.wait(ring.slot, ring.phase ^ 1)
            # The second stage has held a part of the query: one wait, and looks afterwards.
            when(ring.slot.equals(1), lambda: block.query_taken.wait(0, i32(0)))
            for r in range(rows):
                ptx(f"cp.async.wait_group {rows - 1};")
                self._convert(now, following, r, ring.slot)
                ptx("cp.async.commit_group;")
            block.full.arrive_warp(
                ring.slot, self.thread, expected=WARP_BYTES if block.paired else 0
            )
            return [*ring.next().values(), *following, *later]

        carry = [*Ring.start(STAGES).values(), *slots, *self.slots(self.first + 1)]
        loop(self.first, self.last, carry, step)
        ptx("cp.async.wait_all;")

    def _convert(self, now: list[Value], following: list[Value], r: int, slot: Value) -> None:
        """Stores one of this thread's rows, and begins to copy its next one."""
        scale = self._scale(r)
        self.store_token(now, scale, r, slot)
        places = self._places(slot, r)
        rope_stage = self._rope_stage(r)
        words = [
            word
            for k in range(self.rope_chunks)
            for word in load_shared(rope_stage, "rrrr", CHUNK * k)
        ]
        pairs = words
        if self.block.format.rope_dtype == "f16":
            pairs = [pair for word in words for pair in e4m3_pairs(word)]
        if scale is not None:
            bits = scale.inverse.as_i32()
            inverse = permute(bits, bits, "0x3232")
            pairs = [multiply_bf16(pair, inverse) for pair in pairs]
        for k in range(2):
            store_shared(places[k], pairs[4 * k : 4 * k + 4], ROPE_TILE)
        # Lanes of a row share its scales.
        ptx("bar.warp.sync -1;", convergent=True)
        raw = self._raw()
        # As many as there are registers for.
        ahead = 3 if scale is not None and scale.rest is None and self.rows == ROWS else 2

        def load(first: int) -> list[list[Value]]:
            parts = range(first, min(first + ahead, PARTS))
            return [load_shared(raw, "rrrr", self._raw_offset(part, r)) for part in parts]

        chunks = load(0)
        for part in range(PARTS):
            if part % ahead == 0:
                chunks += load(part + ahead)
            pairs = [pair for word in chunks[part] for pair in e4m3_pairs(word)]
            if scale is not None:
                pairs = [self._scaled(pair, scale, part // 2) for pair in pairs]
            for k in range(2):
                store_shared(places[k], pairs[4 * k : 4 * k + 4], part * COLUMN_TILE)
            if self.block.paired and part + 1 in SENT_AFTER:
                self._send(slot, SENT_AFTER[part + 1])
        # Together: the compiler puts three instructions before a copy that follows other accesses.
        self._copy_scales_and_rope(following, r)
        for part in range(PARTS):
            self._copy_part(following, r, part)

    def _send(self, slot: Value, tiles: Sequence[int]) -> None:
        """Begins to copy columns of the rows of this warp to the other block of the pair."""
        proxy_fence()
        ptx("bar.warp.sync -1;", convergent=True)

        def copy_all() -> None:
            barrier = self.block.full.at(slot) + self.other
            rows = self.block.tile(slot) + (self.row - self.thread.quad) * wgmma.ROW_BYTES
            for tile in tiles:
                source = rows + tile * COLUMN_TILE
                copy_to_block(source + self.other, source, wgmma.ATOM_BYTES, barrier)

        when(self.thread.lane.equals(0), copy_all)

    def _raw(self) -> Value:
        return self.block.raw + opaque(self.thread.index) * CHUNK

    def _raw_offset(self, part: int, r: int) -> int:
        """Where a thread keeps its chunk of 64 columns of one of its rows."""
        return (part * self.rows + r) * (WARPGROUP * CHUNK)

    def _rope_stage(self, r: int) -> Value:
        row = opaque(self.row) * wgmma.ROW_BYTES
        column = self.thread.column * (CHUNK * self.rope_chunks)
        return self.block.small + row + column + (MEMORY.rope + r * wgmma.ATOM_BYTES)

    def _scales_stage(self, r: int) -> Value:
        offset = MEMORY.scales + r * 8 * SCALES_BYTES
        return self.block.small + opaque(self.row) * SCALES_BYTES + offset

    def _places(self, slot: Value, r: int) -> list[Value]:
        """Where this thread stores its two chunks of eight values of 64 columns."""
        row = self.block.tile(slot) + opaque(self.row) * wgmma.ROW_BYTES + r * wgmma.ATOM_BYTES
        first = row + (((self.thread.column << 1) ^ self.thread.quad) << 4)
        return [first, first ^ CHUNK]

    def _copy_part(self, slots: list[Value], r: int, part: int) -> None:
        source = self.source(self.block.format.nope, slots[r])
        source = source + (self.thread.column * CHUNK).wide() + part * 4 * CHUNK
        copy(self._raw() + self._raw_offset(part, r), source, copied_bytes(slots[r]))

    def _copy_scales_and_rope(self, slots: list[Value], r: int) -> None:
        row_format = self.block.format
        source = self.source(row_format.rope, slots[r])
        source = source + (self.thread.column * (CHUNK * self.rope_chunks)).wide()
        for k in range(self.rope_chunks):
            copy(self._rope_stage(r) + CHUNK * k, source + CHUNK * k, copied_bytes(slots[r]))
        if row_format.scale is not None:
            source = self.source(row_format.scale, slots[r])
            copy(self._scales_stage(r), source, copied_bytes(slots[r]))

    def _scale(self, r: int) -> _Scales | None:
        if self.block.format.scale is None:
            return None
        return _Scales.of(self.block.format, load_shared(self._scales_stage(r), "rrrr"))

    def _scaled(self, pair: Value, scale: _Scales, group: int) -> Value:
        product = multiply_f16(pair, scale.relative[group])
        if scale.rest is None:
            return product
        rest = multiply_f16(pair, scale.rest[group])
        return fma_f16(pair, scale.relative[group], rest)


class Copier(Rows):
    """Rows of bf16 values: copied as they are stored."""

    def run(self) -> None:
        """All blocks of keys."""
        block = self.block

        def step(number: Value, *carry: Value) -> list[Value]:
            ring, now = Ring(STAGES, *carry[:2]), list(carry[2:])
            following = self.slots(number + 1)
            block.empty.wait(ring.slot, ring.phase ^ 1)
            self.bring(now, ring.slot)
            for r in range(self.rows):
                self.store_token(now, None, r, ring.slot)
            block.full.arrive_warp(ring.slot, self.thread)
            block.full.arrive_on_copies(ring.slot)
            return [*ring.next().values(), *following]

        carry = [*Ring.start(STAGES).values(), *self.slots(self.first)]
        loop(self.first, self.last, carry, step)

    def bring(self, slots: list[Value], slot: Value) -> None:
        """Begins to copy this warp's rows: four at a time, eight lanes each."""
        thread, row_format = self.thread, self.block.format
        lane, own = thread.lane & 7, thread.lane >> 3
        tile = self.block.tile(slot) + (thread.warp * 16) * wgmma.ROW_BYTES
        for step in range(4):
            row = own + 4 * step
            named = shuffle(slots[step // 2], (row & 7) << 2)
            size = copied_bytes(named)
            place = tile + row * wgmma.ROW_BYTES + ((lane ^ (row & 7)) << 4)
            nope, rope = (
                self.source(part, named) + (lane * CHUNK).wide()
                for part in (row_format.nope, row_format.rope)
            )
            for t in range(PARTS + 1):
                source = rope if t == PARTS else nope + t * wgmma.ROW_BYTES
                copy(place + t * COLUMN_TILE, source, size)


def _twice_f16(x: Value) -> tuple[Value, Value]:
    """A float as f16, in both halves of a word, and the float that it has become."""
    word = pack_f16(x, x)
    (back,) = ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }",
        word,
        out="f",
        pure=True,
    )
    return word, back
