"""What all warpgroups of a block know: where everything lies, and which tasks are theirs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pallas_kernels.device.memory import shared_address
from pallas_kernels.device.simt import (
    WARPGROUP,
    Thread,
    Value,
    block_thread,
    loop,
    maximum,
    ptx,
    scalar,
    when,
)
from pallas_kernels.device.sync import BYTES, Barriers
from pallas_kernels.sparse_decode.task import Task
from pallas_kernels.sparse_decode.tuning import SHARED_BYTES, SLOTS, Shape
from pallas_kernels.sparse_prefill.tuning import HEAD_TILE, HEADS, PARTS, WARPS, Tuning


class SmallMemory(NamedTuple):
    """Byte offsets of the small arrays in shared memory.

    Attributes:
        full: a stage's rows are there.
        empty: they are no longer needed.
        decided: whether they raise a head's reference is known.
        weighted: a stage's weights P are there, in place of its rotary values.
        query_full: the query is there.
        query_empty: it is no longer needed.
        result_full: the outputs' factors are there.
        result_empty: they are no longer needed.
        masked: per stage and copying warp, the set of its rows that are masked.
        raised: per stage and warp of heads, whether the stage raised the reference of any head.
        decay: per stage and head, the factor on earlier weights, valid if `raised`.
        factor: per head, the factor on the output.
        size: bytes of all.
    """

    full: int
    empty: int
    decided: int
    weighted: int
    query_full: int
    query_empty: int
    result_full: int
    result_empty: int
    masked: int
    raised: int
    decay: int
    factor: int
    size: int

    @classmethod
    def of(cls, stages: int) -> "SmallMemory":
        """Laid out one after the other."""
        sizes = [BYTES * stages] * 4 + [BYTES] * 4
        sizes += [4 * WARPS * stages] * 2 + [4 * HEADS * stages, 4 * HEADS]
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // 16) * 16
        return cls._make([*offsets, end])


def shared_bytes(tuning: Tuning) -> dict[str, int]:
    """The arrays in shared memory and their sizes."""
    sizes = {
        "query": (PARTS + 1 - tuning.held) * HEAD_TILE,
        "tiles": tuning.stages * tuning.stage_bytes,
        "small": SmallMemory.of(tuning.stages).size,
    }
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
        tuning: Tuning,
        shape: Shape,
        shared: Mapping[str, Any],
        arrays: Mapping[str, Any],
        number: Any,
    ) -> None:
        """Emits the addresses.

        Args:
            tuning: of the block.
            shape: of the launch.
            shared: references to the arrays of `shared_bytes`.
            arrays: references to the arrays in global memory.
            number: of this block in the grid.
        """
        self.tuning, self.shape, self.arrays = tuning, shape, arrays
        self.number = scalar(number)
        self.thread = Thread.current()
        self.memory = SmallMemory.of(tuning.stages)
        self.query, self.tiles, self.small = (
            shared_address(shared[name]) for name in ("query", "tiles", "small")
        )

        def barriers(offset: int, count: int) -> Barriers:
            return Barriers(self.small + offset, count)

        memory, stages = self.memory, tuning.stages
        self.full, self.empty = barriers(memory.full, stages), barriers(memory.empty, stages)
        self.decided = barriers(memory.decided, stages)
        self.weighted = barriers(memory.weighted, stages)
        self.query_full, self.query_empty = (
            barriers(memory.query_full, 1),
            barriers(memory.query_empty, 1),
        )
        self.result_full, self.result_empty = (
            barriers(memory.result_full, 1),
            barriers(memory.result_empty, 1),
        )

    def initialise(self) -> None:
        """By one thread of the block; all must meet afterwards."""

        def once() -> None:
            self.full.initialise(WARPS + WARPGROUP)
            self.empty.initialise(2 * WARPS)
            self.decided.initialise(WARPS)
            self.weighted.initialise(WARPS)
            self.query_full.initialise(WARPGROUP)
            self.query_empty.initialise(WARPS)
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

    def stages_of(self, task: Task) -> Value:
        """How many stages the keys of a task fill."""
        keys = self.tuning.keys
        return (maximum(task.length(), 0) + (keys - 1)) // keys

    def tile(self, slot: Value) -> Value:
        """The address of a stage's rows."""
        return self.tiles + slot * self.tuning.stage_bytes

    def head_row(self) -> Value:
        """The upper of the two heads that this thread has of a product."""
        return self.thread.warp * 16 + self.thread.quad
