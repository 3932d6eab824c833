"""Which keys are whose: all tiles of all groups of queries, in order, in equal shares for blocks.

A group's tiles are those that any of its queries sees. Every warp works the shares out for itself.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pallas_kernels.device.memory import load_global
from pallas_kernels.device.simt import (
    WARP,
    Value,
    ballot,
    floor_divide,
    i32,
    loop,
    lowest_bit,
    maximum,
    minimum,
    select,
    shuffle,
    sum_below,
)
from pallas_kernels.indexer_logits.block import Block
from pallas_kernels.indexer_logits.tuning import TILE


class Window(NamedTuple):
    """The positions that a query sees."""

    start: Value
    end: Value


class Group(NamedTuple):
    """Queries of one request that see its keys together.

    Attributes:
        request: whose they are.
        query: the first of them, among all of all requests.
        size: how many of them exist.
        first: the first tile that one of them sees.
        tiles: how many from there; 0 if none sees anything.
        end: one past the last position that one of them sees.
    """

    request: Value
    query: Value
    size: Value
    first: Value
    tiles: Value
    end: Value


class Share(NamedTuple):
    """What is left to a block of a group's tiles, as numbers of tiles of the request."""

    group: Group
    lower: Value
    upper: Value


class Schedule:
    """The shares of one block."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._groups = block.tuning.groups(block.shape)
        self._run = -(-self._groups // WARP)  # groups whose tiles one lane adds up

    def window(self, query: Value) -> Window:
        """What a query sees, clipped to the columns; it may be empty."""
        shape, block = self._block.shape, self._block
        start = i32(0)
        if shape.has_starts:
            (start,) = load_global(block.array("starts") + query.wide() * 4, "r")
            start = maximum(start, 0)
        (end,) = load_global(block.array("ends") + query.wide() * 4, "r")
        return Window(start, minimum(end, shape.columns))

    def group(self, number: Value) -> Group:
        """A group by its number."""
        shape, tuning = self._block.shape, self._block.tuning
        parts = tuning.groups_of_request(shape)
        request = number // parts
        own = (number % parts) * tuning.group
        query = request * shape.queries + own
        size = minimum(i32(shape.queries) - own, tuning.group)

        def join(i: Value, start: Value, end: Value) -> list[Value]:
            window = self.window(query + i)
            sees = window.end > window.start + shape.longer_than
            return [
                minimum(start, select(sees, window.start, start)),
                maximum(end, select(sees, window.end, end)),
            ]

        start, end = loop(0, size, [i32(shape.columns), i32(0)], join)
        sees = end > start
        first = select(sees, floor_divide(start, TILE), i32(0))
        tiles = select(sees, floor_divide(end + (TILE - 1), TILE) - first, i32(0))
        return Group(request, query, size, first, tiles, end)

    def for_each(
        self, carry: Sequence[Value], body: Callable[[Share, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        """`carry = body(share, carry)` for the groups of which this block has tiles, in order."""
        lane = self._block.thread.lane
        begin = lane * self._run

        def add(i: Value, total: Value) -> list[Value]:
            number = begin + i
            tiles = self.group(minimum(number, self._groups - 1)).tiles
            return [total + select(number < self._groups, tiles, i32(0))]

        (own,) = loop(0, i32(self._run), [i32(0)], add)
        up_to = sum_below(own, lane)
        total, blocks = shuffle(up_to, WARP - 1), self._block.tuning.blocks(self._block.shape)
        number, each, larger = self._block.number, total // blocks, total % blocks
        first = number * each + minimum(number, larger)
        last = first + each + select(number < larger, i32(1), i32(0))

        def find(tile: Value) -> list[Value]:
            """The group that has a tile, of all tiles, and how many are before the group's."""
            holds = (up_to > tile) & (tile >= up_to - own)
            chosen = lowest_bit(ballot(holds) | (1 << (WARP - 1)))
            group, before = chosen * self._run, shuffle(up_to - own, chosen)

            def pass_by(i: Value, group: Value, before: Value) -> list[Value]:
                after = before + self.group(minimum(group, self._groups - 1)).tiles
                passed = tile >= after
                return [select(passed, group + 1, group), select(passed, after, before)]

            # The last group of a lane's need not be looked at: the tile is there, or before.
            return loop(0, i32(self._run - 1), [group, before], pass_by)

        start, before = find(first)
        stop, _ = find(last - 1)

        def one(index: Value, before: Value, *carry: Value) -> list[Value]:
            group = self.group(minimum(index, self._groups - 1))
            shift = group.first - before
            lower = maximum(first + shift, group.first)
            upper = minimum(last + shift, group.first + group.tiles)
            carry = tuple(body(Share(group, lower, upper), list(carry)))
            return [before + group.tiles, *carry]

        stop = select(last > first, stop + 1, start)
        return loop(start, stop, [before, *carry], one)[1:]
