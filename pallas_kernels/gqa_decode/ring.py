"""A warp's own ring of keys and values in shared memory, which it fills and reads alone."""

from pallas_kernels.device.memory import CHUNK, WORD, copied_bytes, copy, copy_word
from pallas_kernels.device.simt import (
    WARP,
    Value,
    ballot,
    i32,
    opaque,
    ptx,
    select,
    shuffle,
)
from pallas_kernels.gqa_decode.block import Block


class Ring:
    """Steps are copied `stages - 1` ahead.

    What a loop carries of it: the stage that is read next, the slots of the step that is copied
    next, and for each step under way which of its keys exist.
    """

    def __init__(self, block: Block, first: Value, end: Value) -> None:
        """The ring of a block whose steps begin at `first`, for positions below `end`."""
        self.block, self.thread = block, block.thread
        self.stages, self.keys = block.tuning.stages, block.tuning.keys
        self.first, self.end = first, end

    def start(self) -> list[Value]:
        """Begins to copy the first steps; what the loop carries."""
        masks = []
        for stage in range(self.stages - 1):
            slot = self.block.slot_of(self.first + stage, self.end)
            masks.append(self._copy(i32(stage), slot))
        slot = self.block.slot_of(self.first + (self.stages - 1), self.end)
        return [i32(0), slot, *masks]

    def next(self, step: Value, carry: list[Value]) -> tuple[Value, Value, list[Value]]:
        """Waits for a step: where it lies, a bit for each of its keys that exists, the new carry.

        All lanes are done with the step before.
        """
        stage, slot, *masks = carry
        ptx(f"cp.async.wait_group {self.stages - 2};")
        ptx("bar.warp.sync -1;", convergent=True)
        free = select(stage.equals(0), i32(self.stages), stage) - 1
        coming = self._copy(free, slot)
        slot = self.block.slot_of(step + self.stages, self.end)
        following = stage + 1
        following = select(following.equals(self.stages), i32(0), following)
        address = self.block.ring + stage * self.block.memory.size
        return address, masks[0], [following, slot, *masks[1:], coming]

    def finish(self) -> None:
        """Waits for copies that nothing reads."""
        ptx("cp.async.wait_group 0;")

    def _copy(self, stage: Value, slot: Value) -> Value:
        """Begins to copy the rows of a step; a bit for each that exists.

        One that does not becomes zeros, and nothing is read in its place.
        """
        block, thread, row_format = self.block, self.thread, self.block.format
        place = block.ring + stage * block.memory.size
        stride = block.shape.kv_heads * row_format.row_bytes
        head = (block.kv_head * row_format.row_bytes).wide()
        keys, values = block.array("keys") + head, block.array("values") + head
        chunks = row_format.row_bytes // CHUNK
        # Known in the loop alone: places that are kept from step to step cost registers.
        lane = opaque(thread.lane)
        chunk = (lane % chunks) * CHUNK
        for first in range(0, self.keys, WARP // chunks):
            row = lane // chunks + first
            named = shuffle(slot, row)
            size = copied_bytes(named)
            source = _row_or_first(named).wide() * stride + chunk.wide()
            target = place + row_format.place(row, chunk)
            copy(target + block.memory.keys, keys + source, size)
            copy(target + block.memory.values, values + source, size)
        if row_format.scale_bytes:
            self._copy_scales(place, slot)
        ptx("cp.async.commit_group;")
        return ballot(slot >= 0)

    def _copy_scales(self, place: Value, slot: Value) -> None:
        """By the lane of each row."""
        block, size = self.block, self.block.format.scale_bytes
        row = _row_or_first(slot).wide() * block.shape.kv_heads + block.kv_head.wide()
        copied = select(slot < 0, i32(0), i32(WORD))
        for name, offset in (
            ("key_scales", block.memory.key_scales),
            ("value_scales", block.memory.value_scales),
        ):
            source = block.array(name) + row * size
            target = place + self.thread.lane * size + offset
            for word in range(0, size, WORD):
                copy_word(target + word, source + word, copied)


def _row_or_first(slot: Value) -> Value:
    """A slot that exists, even in place of one that is masked."""
    return select(slot < 0, i32(0), slot)
