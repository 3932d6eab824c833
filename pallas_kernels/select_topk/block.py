"""A block of the grid as one of its threads sees it: its row, its memory, its threads together."""

import dataclasses
from collections.abc import Mapping, Sequence

from pallas_kernels.device.memory import (
    count_shared_where,
    load_global,
    load_shared,
    store_shared,
)
from pallas_kernels.device.scan import sums_before
from pallas_kernels.device.simt import (
    WARP,
    Value,
    block_thread,
    i32,
    i64,
    minimum,
    opaque,
    select,
    when,
)
from pallas_kernels.device.sync import named_barrier
from pallas_kernels.select_topk.shape import Shape

BINS = 4096  # of a histogram: 12 bits of a key
DIGIT = 12
BARRIER = 8  # its number; Mosaic's are below
HEADER = 64  # words: totals of warps, counters


@dataclasses.dataclass(frozen=True)
class Window:
    """The columns of a row that count.

    Attributes:
        row: its number.
        start: the first column.
        length: how many; 0 if there are none.
        has_start: whether that is not the first for all rows.
    """

    row: Value
    start: Value
    length: Value
    has_start: bool

    @classmethod
    def of_row(cls, shape: Shape, arrays: Mapping[str, Value], row: Value) -> "Window":
        """Clipped to what the row holds."""
        start = i32(0)
        if shape.has_starts:
            (start,) = load_global(arrays["starts"] + row.wide() * 4, "r")
            start = opaque(clip(start, i32(shape.columns)))
        (length,) = load_global(arrays["lengths"] + row.wide() * 4, "r")
        # Opaque, or what was loaded would be kept besides.
        length = opaque(clip(length, i32(shape.columns) - start))
        return cls(row, start, length, shape.has_starts)

    @property
    def end(self) -> Value:
        """The column after the last."""
        return self.start + self.length

    def only(self, column: Value, values: Sequence[Value], outside: Value) -> list[Value]:
        """The values of consecutive columns, with others for those that do not count."""
        end = self.end - column
        inside = [select(end > i, value, outside) for i, value in enumerate(values)]
        if not self.has_start:
            return inside
        before = self.start - column
        return [select(before > i, outside, value) for i, value in enumerate(inside)]


def clip(value: Value, upper: Value) -> Value:
    """0 if the value is negative, `upper` if it is more."""
    return minimum(select(value < 0, i32(0), value), upper)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of the grid, which works on one row.

    Attributes:
        shape: of the launch.
        threads: how many.
        thread: this one.
        lane: this one's in its warp.
        window: of the row.
        shared: the address of each part of shared memory.
        arrays: the address of each array in global memory.
    """

    shape: Shape
    threads: int
    thread: Value
    lane: Value
    window: Window
    shared: Mapping[str, Value]
    arrays: Mapping[str, Value]

    @classmethod
    def of(
        cls,
        shape: Shape,
        threads: int,
        sizes: Mapping[str, int],
        base: Value,
        arrays: Mapping[str, Value],
        row: Value,
    ) -> "Block":
        """The block of a row.

        Args:
            shape: of the launch.
            threads: how many.
            sizes: words of each part of its shared memory.
            base: the address of the first of these.
            arrays: addresses in global memory.
            row: of the scores.
        """
        shared = {}
        for name, words in sizes.items():
            shared[name] = base
            base = base + 4 * words
        thread = block_thread()
        window = Window.of_row(shape, arrays, row)
        return cls(shape, threads, thread, thread & (WARP - 1), window, shared, arrays)

    def with_window(self) -> "Block":
        """The same with a window that is read again."""
        # Opaque, or the compiler would keep the one of before.
        row = opaque(self.window.row)
        return dataclasses.replace(self, window=Window.of_row(self.shape, self.arrays, row))

    def sync(self) -> None:
        """Joins the threads."""
        named_barrier(BARRIER, self.threads)

    def score_address(self, column: Value) -> Value:
        """Where a score of the row is."""
        row = self.window.row.wide() * i64(4 * self.shape.columns)
        return self.arrays["scores"] + row + column.wide() * 4

    def clear(self, part: str, words: int) -> None:
        """Zeros in the first words of a part, a multiple of four times the threads, or less."""
        zeros = [i32(0)] * 4
        rounds, rest = divmod(words, 4 * self.threads)
        address = self.shared[part] + self.thread * 16
        for i in range(rounds):
            store_shared(address, zeros, 16 * self.threads * i)
        if rest:
            last = address + 16 * self.threads * rounds
            when(self.thread < rest // 4, lambda: store_shared(last, zeros))

    def sum_before(self, value: Value) -> Value:
        """The sum of the values of all threads before this one.

        A barrier must be between two calls.
        """
        before, _ = sums_before(
            [value], self.thread, self.threads, self.shared["header"], self.sync
        )
        return before[0]

    def total(self, value: Value) -> Value:
        """The sum of the values of all threads, as `sum_before`."""
        up_to = self.sum_before(value) + value
        place = self.shared["header"] + 4 * WARP
        when(self.thread.equals(self.threads - 1), lambda: store_shared(place, [up_to]))
        self.sync()
        return load_shared(place, "r")[0]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of numbers below `BINS`, in shared memory.

    It must be empty before the first count, and `find` leaves it so.
    """

    block: Block

    def clear(self) -> None:
        """All counts are 0 after the block's next barrier."""
        self.block.clear("histogram", BINS)

    def count(self, number: Value, condition: Value) -> None:
        """Counts this thread's number where the condition holds."""
        count_shared_where(condition, self.block.shared["histogram"] + (number << 2))

    def find(self, need: Value) -> Sequence[Value]:
        """The bin in which the `need`-th largest number is, after a barrier.

        Returns:
            The bin, how many numbers are in bins above it, and how many are in it. It may be
            counted again at once; a barrier must be before the next call of this.
        """
        block = self.block
        own = BINS // block.threads
        first = i32(BINS - own) - block.thread * own
        address = block.shared["histogram"] + first * 4
        counts = [
            word for offset in range(0, own, 4) for word in load_shared(address, "rrrr", 4 * offset)
        ]
        for offset in range(0, own, 4):
            store_shared(address, [i32(0)] * 4, 4 * offset)
        total = counts[0]
        for each in counts[1:]:
            total = total + each
        above = block.sum_before(total)
        result = block.shared["header"] + 4 * WARP
        found = above.below(need) & (above + total).at_least(need)
        chosen, before, inside = i32(0), above, i32(0)
        for i in reversed(range(own)):
            here = above.below(need) & (above + counts[i]).at_least(need)
            chosen = select(here, first + i, chosen)
            before = select(here, above, before)
            inside = select(here, counts[i], inside)
            above = above + counts[i]
        when(found, lambda: store_shared(result, [chosen, before, inside, i32(0)]))
        block.sync()
        return load_shared(result, "rrrr")[:3]
