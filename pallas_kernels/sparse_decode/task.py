"""Which query, heads and keys a block serves."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from pallas_kernels.device.boxes import Arrays
from pallas_kernels.device.memory import global_address, load_global
from pallas_kernels.device.row_formats import TILE, Part
from pallas_kernels.device.simt import Value, floor_divide, i32, minimum, select
from pallas_kernels.sparse_decode.tuning import Shape


class Keys(Protocol):
    """Where the keys of a task come from, and which of them take part.

    Attributes:
        neighbours: keys whose places begin at a multiple of this number lie in as many
            consecutive slots.
    """

    neighbours: int

    def place_row(self, place: Value) -> None:
        """Stores the query that the task is for; by all threads, which must meet afterwards."""
        ...

    def take_row(self, place: Value) -> None:
        """Has the task be for that query."""
        ...

    def length(self) -> Value:
        """How many places, in the order of keys, the task's heads attend to at most."""
        ...

    def blocks(self, length: Value) -> tuple[Value, Value]:
        """The range of blocks of keys that the task attends to; it may be empty."""
        ...

    def slots(self) -> Callable[[Value, Value], Value]:
        """From a place and the end of all places to a slot of the cache; -1 is masked."""
        ...

    def limiter(
        self, head: Callable[[int], Value], key: Callable[[int], Value]
    ) -> Callable[[Value, Sequence[Value]], list[Value]]:
        """From a block of keys and a thread's logits to these, -inf where a head sees less.

        That is where a head does not attend to a key that other heads of the task do.

        Args:
            head: of a logit, its number in the task.
            key: of a logit, its number in the block of keys.
        """
        ...


class Task:
    """One share of the work, as one thread sees it.

    Attributes:
        shape: of the launch.
        heads: of the query that the task serves.
        arrays: references to the arrays in global memory.
        row: the query.
        split: which part of its keys.
        first_head: the first of its heads.
        keys: that it attends to.
    """

    def __init__(
        self,
        shape: Shape,
        heads: int,
        arrays: Arrays,
        index: Value,
        keys: "Callable[[Task], Keys] | None" = None,
    ) -> None:
        """Emits the numbers.

        Args:
            shape: of the launch.
            heads: that one block serves.
            arrays: references to the arrays in global memory.
            index: of the share; shares of one query are neighbours.
            keys: where the keys come from; None is a list for each query.
        """
        self.shape, self.heads, self.arrays = shape, heads, arrays
        tiles = math.ceil(shape.heads / heads)
        per_query = tiles * shape.splits
        self.row = index // per_query
        rest = index % per_query
        self.split = rest // tiles
        self.first_head = (rest % tiles) * heads
        self.keys: Keys = (keys or ListedKeys)(self)

    def length(self) -> Value:
        """How many places of keys count."""
        return self.keys.length()

    def key_blocks(self, length: Value) -> tuple[Value, Value]:
        """The range of blocks of keys that this block attends to; it may be empty."""
        return self.keys.blocks(length)

    def row_offset(self, part: Part, slot: Value) -> Value:
        """Bytes from the part of the first row to that of the row in `slot`, at least 0; wide."""
        if self.shape.pages is None:
            return slot.wide() * part.stride
        size, page_bytes = self.shape.pages
        place = (slot % size).wide() * part.stride + size * part.behind
        return (slot // size).wide() * page_bytes + place

    def result_row(self, head: Value) -> Value:
        """The place of a head's result among all results, wide."""
        row = self.row + self.split * self.shape.n
        return row.wide() * self.shape.heads + head.wide()


KeySource = Callable[[Task], Keys]
ROW_BYTES = 16  # of shared memory, in which a block keeps its query's number


class ListedKeys:
    """The keys that a query names one by one."""

    neighbours = 1

    def __init__(self, task: Task) -> None:
        self.task, self.shape = task, task.shape

    def place_row(self, place: Value) -> None:
        """Tasks are in the order of the queries."""

    def take_row(self, place: Value) -> None:
        """Nothing is stored."""

    def length(self) -> Value:
        """How many of the query's slots count."""
        if not self.shape.has_lengths:
            return i32(self.shape.topk)
        address = global_address(self.task.arrays["lengths"]) + self.task.row.wide() * 4
        return minimum(load_global(address, "r")[0], self.shape.topk)

    def blocks(self, length: Value) -> tuple[Value, Value]:
        """The parts of a list are equal, whatever its length."""
        first = self.task.split * self.shape.blocks_per_split
        used = floor_divide(length + (TILE - 1), TILE)
        return first, minimum(first + self.shape.blocks_per_split, used)

    def slots(self) -> Callable[[Value, Value], Value]:
        """Whatever is not a slot is masked."""
        shape = self.shape
        indices = global_address(self.task.arrays["indices"])
        indices = indices + self.task.row.wide() * (4 * shape.topk)

        def slot_at(place: Value, end: Value) -> Value:
            safe = minimum(place, shape.topk - 1)
            (slot,) = load_global(indices + safe.wide() * 4, "r")
            return select((place < end) & slot.below(shape.num_slots), slot, i32(-1))

        return slot_at

    def limiter(
        self, head: Callable[[int], Value], key: Callable[[int], Value]
    ) -> Callable[[Value, Sequence[Value]], list[Value]]:
        """All heads of a query attend to the same keys."""
        return lambda number, logits: list(logits)


def row_or_first(slot: Value) -> Value:
    """A slot that exists, even in place of one that is masked."""
    return select(slot < 0, i32(0), slot)
