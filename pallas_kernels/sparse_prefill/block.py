"""What all warpgroups of a block know: where everything lies, and which tasks are theirs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pallas_kernels.device.boxes import Arrays
from pallas_kernels.device.memory import shared_address
from pallas_kernels.device.row_formats import TILE
from pallas_kernels.device.simt import (
    WARPGROUP,
    Thread,
    Value,
    block_thread,
    floor_divide,
    loop,
    maximum,
    ptx,
    scalar,
    when,
)
from pallas_kernels.device.sync import BYTES, Barriers
from pallas_kernels.sparse_decode.task import Task
from pallas_kernels.sparse_decode.tuning import SHARED_BYTES, SLOTS, Shape
from pallas_kernels.sparse_prefill.tuning import GROUPS, HEADS, SHARES, STAGE_BYTES, WARPS


class SmallMemory(NamedTuple):
    """Byte offsets of the small arrays in shared memory. A stage is that of a group of scores.

    Attributes:
        decided: per stage, its references are known.
        weighted: per stage and share, its weights P are there, in place of its rotary values.
        empty: per stage and copying warp, the warp's rows are no longer needed.
        query_full: the query is there.
        query_empty: it is no longer needed.
        partial_full: what the second group knows of the whole softmax is there.
        partial_empty: it is no longer needed.
        result_full: the outputs' factors are there.
        result_empty: they are no longer needed.
        masked: per stage and copying warp, the set of its rows that are masked.
        raised: per stage and warp of heads, whether the stage raised the reference of any head.
        decay: per stage and head, the factor on earlier weights, valid if `raised`.
        reference: per head, the logit whose weight is 1.
        partial: the second group's references, sums and largest logits, per head.
        factor: per head, the factor on the output.
        size: bytes of all.
    """

    decided: int
    weighted: int
    empty: int
    query_full: int
    query_empty: int
    partial_full: int
    partial_empty: int
    result_full: int
    result_empty: int
    masked: int
    raised: int
    decay: int
    reference: int
    partial: int
    factor: int
    size: int

    @classmethod
    def layout(cls) -> "SmallMemory":
        """Laid out one after the other."""
        sizes = [BYTES * GROUPS, BYTES * GROUPS * SHARES, BYTES * GROUPS * WARPS]
        sizes += [2 * BYTES] * 6 + [4 * WARPS * GROUPS] * 2
        sizes += [4 * HEADS * GROUPS, 4 * HEADS, 3 * 4 * HEADS, 4 * HEADS]
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += size
        return cls._make([*offsets, end])


MEMORY = SmallMemory.layout()


def shared_bytes() -> dict[str, int]:
    """The arrays in shared memory and their sizes."""
    sizes = {"query": STAGE_BYTES, "tiles": GROUPS * STAGE_BYTES, "small": MEMORY.size}
    assert sum(-(-size // 1024) * 1024 for size in sizes.values()) <= SHARED_BYTES
    return sizes


def blocks_of(shape: Shape) -> int:
    """Blocks of the grid: no more than run at once, since a block takes one task after another."""
    return min(tasks_of(shape), SLOTS)


def tasks_of(shape: Shape) -> int:
    """Queries times tiles of their heads."""
    return shape.n * -(-shape.heads // HEADS)


class Block:
    """One block, as one thread sees it."""

    def __init__(
        self,
        shape: Shape,
        shared: Mapping[str, Any],
        arrays: Arrays,
        number: Any,
    ) -> None:
        """Emits the addresses.

        Args:
            shape: of the launch.
            shared: references to the arrays of `shared_bytes`.
            arrays: references to the arrays in global memory.
            number: of this block in the grid.
        """
        self.shape, self.arrays = shape, arrays
        self.number = scalar(number)
        self.thread = Thread.current()
        self.query, self.tiles, self.small = (
            shared_address(shared[name]) for name in ("query", "tiles", "small")
        )

        def barriers(offset: int, count: int = 1) -> Barriers:
            return Barriers(self.small + offset, count)

        self.decided = barriers(MEMORY.decided, GROUPS)
        self.weighted = barriers(MEMORY.weighted, GROUPS * SHARES)
        self.empty = barriers(MEMORY.empty, GROUPS * WARPS)
        self.query_full = barriers(MEMORY.query_full)
        self.query_empty = barriers(MEMORY.query_empty)
        self.partial_full = barriers(MEMORY.partial_full)
        self.partial_empty = barriers(MEMORY.partial_empty)
        self.result_full = barriers(MEMORY.result_full)
        self.result_empty = barriers(MEMORY.result_empty)

    def initialise(self) -> None:
        """By one thread of the block; all must meet afterwards."""

        def once() -> None:
            self.decided.initialise(WARPS)
            self.weighted.initialise(WARPS)
            self.empty.initialise(2 * WARPS)
            self.query_full.initialise(GROUPS * WARPGROUP)
            self.query_empty.initialise(GROUPS * WARPS)
            self.partial_full.initialise(WARPS)
            self.partial_empty.initialise(WARPS)
            self.result_full.initialise(WARPS)
            self.result_empty.initialise(2 * WARPS)

        when(block_thread().equals(0), once)
        ptx("fence.mbarrier_init.release.cluster;")
        ptx("bar.sync 0;", convergent=True)

    def for_each_task(
        self, carry: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        """`carry = body(task, carry)` for the numbers of all tasks of this block."""
        rounds = (self.number * -1 + (tasks_of(self.shape) + SLOTS - 1)) // SLOTS
        return loop(
            0, rounds, carry, lambda i, *values: body(self.number + i * SLOTS, list(values))
        )

    def task(self, index: Value) -> Task:
        """A query and the first of its 64 heads."""
        return Task(self.shape, HEADS, self.arrays, index)

    def tile(self, stage: Value | int) -> Value:
        """The address of a stage's rows."""
        return self.tiles + stage * STAGE_BYTES

    def head_row(self) -> Value:
        """The upper of the two heads that this thread has of a product."""
        return self.thread.warp * 16 + self.thread.quad


def key_blocks(length: Value) -> Value:
    """How many blocks of keys a list of that length fills."""
    return floor_divide(maximum(length, 0) + (TILE - 1), TILE)
