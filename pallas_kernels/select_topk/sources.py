"""Where scores are read: registers, the row itself, or what was kept of it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, Self

from pallas_kernels.device.memory import load_global, load_shared
from pallas_kernels.device.simt import (
    Value,
    either,
    f32,
    floor_divide,
    i32,
    loop,
    minimum,
    opaque,
    ptx,
    select,
)
from pallas_kernels.select_topk.block import Block

OUTSIDE = 0  # the key of what is not in the window
_SIGN = -(2**31)


@dataclasses.dataclass(frozen=True)
class Group:
    """Keys of consecutive columns.

    Attributes:
        column: of the first, a multiple of how many there are.
        keys: unsigned numbers in the order of the scores; `OUTSIDE` is below all of them.
    """

    column: Value
    keys: Sequence[Value]


Body = Callable[..., Sequence[Value]]


class Source(Protocol):
    """Scores that the threads of a block share out among them."""

    def each(self, body: Callable[[Iterable[Group]], None]) -> None:
        """Calls `body` until all scores have been in one of its groups."""


def ordered_key(score: Value) -> Value:
    """The bits of a score as an unsigned number: NaN is 1, -inf next, and -0.0 equals 0.0."""
    # The sum makes 0.0 of -0.0, and one NaN of all: that becomes -1 in the order of the others.
    (canonical,) = ptx("add.rn.f32 $0, $1, $2;", score.as_f32(), f32(0.0), out="f", pure=True)
    bits = canonical.as_i32()
    return (bits ^ (floor_divide(bits, 2**31) | _SIGN)) + 2


def load_group(block: Block, column: Value, *, checked: bool) -> Callable[[], Group]:
    """Begins to load a vector; the result waits for it.

    `checked` ones may lie outside the window in part, or outside the row.
    """
    size = block.shape.vector
    place = minimum(column, block.shape.columns - size) if checked else column
    words = load_global(block.score_address(place), "r" * size, cache=".nc.L1::no_allocate")

    def group() -> Group:
        keys = [ordered_key(word) for word in words]
        if checked:
            keys = block.window.only(column, keys, i32(OUTSIDE))
        return Group(column, keys)

    return group


@dataclasses.dataclass(frozen=True)
class Registers:
    """A row of which each thread holds some.

    Attributes:
        first: the thread's first column.
        stride: columns from one of its groups to the next.
        keys: of each group.
    """

    first: Value
    stride: int
    keys: Sequence[Sequence[Value]]

    @classmethod
    def load(cls, block: Block, vectors: int) -> Self:
        """All of a row that is no longer than the threads' vectors together."""
        first = block.thread * block.shape.vector
        stride = block.threads * block.shape.vector
        under_way = [load_group(block, first + i * stride, checked=True) for i in range(vectors)]
        return cls(first, stride, [group().keys for group in under_way])

    def each(self, body: Callable[[Iterable[Group]], None]) -> None:
        """See `Source`."""
        body(self.groups)

    @property
    def groups(self) -> Iterator[Group]:
        """What is held, anew: no register keeps what was computed of it for another use."""
        for i, keys in enumerate(self.keys):
            yield Group(opaque(self.first) + i * self.stride, [opaque(key) for key in keys])


@dataclasses.dataclass(frozen=True)
class Row:
    """A row in global memory, read in tiles.

    Attributes:
        block: that reads it.
        vectors: loads of a thread for a tile.
        part: which of the blocks that share the row this one is.
        parts: how many there are.
    """

    block: Block
    vectors: int
    part: Value
    parts: int

    def each(self, body: Callable[[Iterable[Group]], None]) -> None:
        """See `Source`."""

        def without_carry(groups: Sequence[Group]) -> Sequence[Value]:
            body(groups)
            return []

        self.fold([], without_carry)

    def fold(self, carry: Sequence[Value], body: Body) -> Sequence[Value]:
        """`carry = body(groups, *carry)` for each tile, with i32 values."""
        window = self.block.window

        def step(i: Value, *carry: Value) -> Sequence[Value]:
            first = self.first(i)

            def run(checked: bool) -> Sequence[Value]:
                return body(self.load(first, checked=checked), *carry)

            inside = (first >= window.start) & (window.end >= first + self.tile)
            return either(inside, len(carry), lambda: run(False), lambda: run(True))

        return loop(0, self.tiles, carry, step)

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return self.block.threads * self.block.shape.vector * self.vectors

    @property
    def tiles(self) -> Value:
        """How many tiles this block reads."""
        window = self.block.window
        columns = window.end - (window.start & -self.block.shape.vector)
        tiles = (columns + (self.tile - 1)) // self.tile
        return (tiles - self.part + (self.parts - 1)) // self.parts

    def first(self, i: Value) -> Value:
        """The first column of this block's tile `i`."""
        origin = self.block.window.start & -self.block.shape.vector
        return origin + (self.part + i * self.parts) * self.tile

    def load(self, first: Value, *, checked: bool) -> list[Group]:
        """The groups of the tile that begins there; see `load_group`."""
        size = self.block.shape.vector
        own = first + self.block.thread * size
        stride = self.block.threads * size
        under_way = [
            load_group(self.block, own + stride * u, checked=checked) for u in range(self.vectors)
        ]
        return [group() for group in under_way]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Pairs of a key and a column in shared memory.

    Attributes:
        block: that reads them.
        count: how many.
    """

    block: Block
    count: Value

    def each(self, body: Callable[[Iterable[Group]], None]) -> None:
        """See `Source`."""
        block = self.block

        def step(i: Value) -> Sequence[Value]:
            place = i * block.threads + block.thread
            address = block.shared["kept"] + (minimum(place, self.count - 1) << 3)
            key, column = load_shared(address, "rr")
            body([Group(column, [select(place < self.count, key, i32(OUTSIDE))])])
            return []

        loop(0, (self.count + (block.threads - 1)) // block.threads, [], step)
