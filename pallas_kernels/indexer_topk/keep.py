"""The warpgroups that take logits from those that multiply, and keep the largest.

A full buffer is cut down to the scores that reach an edge of a histogram which at least k reach,
and from then on others must reach it, too. Where too many share the bin, exactly k are left, and
others must be larger than the least of them: of equal scores the first are kept, as tiles come in
order. So nothing is lost that could be among the k largest of the row, whatever the scores are.
"""

import functools
from collections.abc import Callable, Sequence

from pallas_kernels.device.memory import (
    load_shared,
    store_global,
    store_shared,
    store_shared_where,
)
from pallas_kernels.device.simt import (
    WARPGROUP,
    Value,
    bool_to_int,
    branch,
    i32,
    loop,
    minimum,
    select,
    sum_below,
    when,
)
from pallas_kernels.indexer_logits.block import Block
from pallas_kernels.indexer_logits.schedule import Schedule, Share
from pallas_kernels.indexer_logits.tuning import TILE
from pallas_kernels.indexer_topk.shape import BATCH, CAPACITY, CHOOSERS, PAIR
from pallas_kernels.select_topk import block as topk
from pallas_kernels.select_topk.keeping import LOWEST, Keeper, kept, largest, reserve, set_kept
from pallas_kernels.select_topk.search import Threshold, coarse_shift, search
from pallas_kernels.select_topk.shape import Shape
from pallas_kernels.select_topk.sources import OUTSIDE, Group, ordered_key

_HOLES, _MOVED = 4 * 44, 4 * 45  # bytes into the header
_LOADS = 4  # of a thread at once

# Of a place, the key and the column there, and whether the place is one that was asked for.
_Each = Callable[[Sequence[tuple[Value, Value, Value, Value]]], None]


class _Buffer:
    """The candidates of a share, as a source of keys."""

    def __init__(self, own: topk.Block, count: Value) -> None:
        self._own, self._count = own, count

    def each(self, body: Callable[[Sequence[Group]], None]) -> None:
        """See `Source`."""

        def some(candidates: Sequence[tuple[Value, Value, Value, Value]]) -> None:
            body(
                [
                    Group(column, [select(there, key, i32(OUTSIDE))])
                    for _, key, column, there in candidates
                ]
            )

        self.walk(i32(0), self._count, some)

    def walk(self, first: Value, end: Value, body: _Each) -> None:
        """Calls `body` for the candidates at places between two."""
        own = self._own
        size = own.threads * _LOADS

        def step(i: Value) -> Sequence[Value]:
            begin = first + i * size + own.thread
            places = [begin + u * own.threads for u in range(_LOADS)]
            pairs = [
                load_shared(own.shared["kept"] + minimum(place, end - 1) * PAIR, "rr")
                for place in places
            ]
            body(
                [
                    (place, key, column, place < end)
                    for place, (key, column) in zip(places, pairs, strict=True)
                ]
            )
            return []

        loop(0, (end - first + (size - 1)) // size, [], step)


class _Chooser:
    """The warpgroups as the block of a selection, and what they do for each share."""

    def __init__(self, block: Block, k: int, number: int) -> None:
        shape = Shape(block.shape.requests, block.shape.columns, k, False, None)
        window = topk.Window(i32(0), i32(0), i32(block.shape.columns), False)
        self._block, self._number = block, number
        thread = block.thread.index + number * WARPGROUP
        threads, lane = CHOOSERS * WARPGROUP, block.thread.lane
        self._own = topk.Block(shape, threads, thread, lane, window, block.shared, {})
        self._histogram = topk.Histogram(self._own)
        self._keeper = Keeper.of(self._own, CAPACITY, cluster=False)
        self._histogram.clear()

    def keep(self, share: Share, index: Value) -> Value:
        """Keeps what matters of a share; `index` counts the block's tiles."""
        own = self._own
        own.sync()
        Keeper.clear(own)
        own.sync()

        def step(i: Value, index: Value, lowest: Value) -> Sequence[Value]:
            first = share.lower + i * BATCH
            own_tiles = range(self._number, BATCH, CHOOSERS)
            groups = [self._take(share, first + u, index + u) for u in own_tiles]
            self._keeper.raise_top(largest(groups, i32(0)))
            self._keeper.append(lambda: groups, lowest)
            own.sync()
            count, top = kept(own)
            own.sync()
            full = count > CAPACITY - BATCH * TILE
            (lowest,) = branch(full, [lowest], lambda: [self._cut(count, lowest, top)])
            return [index + BATCH, lowest]

        tiles = share.upper - share.lower
        batches = (tiles + (BATCH - 1)) // BATCH
        _, lowest = loop(0, batches, [index, i32(LOWEST)], step)
        self._write(share, lowest)
        return index + tiles

    def _take(self, share: Share, tile: Value, index: Value) -> Group:
        """This thread's key of a tile, if the share has that tile."""
        block, thread = self._block, self._block.thread
        column = tile * TILE + thread.index

        def take() -> Sequence[Value]:
            slot, phase = block.score_slot(index)
            block.score_full.wait(slot, phase)
            place = block.shared["scores"] + (slot * TILE + thread.index) * 4
            (score,) = load_shared(place, "r")
            block.score_empty.arrive_warp(slot, thread)
            return [select(column < share.group.end, ordered_key(score), i32(OUTSIDE))]

        return Group(column, branch(tile < share.upper, [i32(OUTSIDE)], take))

    def _cut(self, count: Value, lowest: Value, top: Value) -> Value:
        """Leaves the k largest of what is kept, or some more; what a key must reach afterwards."""
        own, k = self._own, self._own.shape.k
        buffer, least = _Buffer(own, count), _least(lowest)
        bound, left = self._bound(buffer, least, top)

        def exactly() -> Sequence[Value]:
            return [*search(own, buffer, least, top, i32(k)), i32(k)]

        # A bin is enough, but where too many share it.
        crowded = left > (k + CAPACITY - BATCH * TILE) // 2
        key, last, left = branch(crowded, [bound - 1, i32(-1), left], exactly)
        threshold = Threshold(key, last)
        own.sync()
        header, holes = own.shared["header"], own.shared["histogram"]
        counters = header + _HOLES
        when(own.thread.equals(0), lambda: store_shared(counters, [i32(0), i32(0)]))
        own.sync()

        def find_holes(candidates: Sequence[tuple[Value, Value, Value, Value]]) -> None:
            wanted = [
                there & (_taken(threshold, key, column) ^ 1) for _, key, column, there in candidates
            ]
            place = _reserve(own, header + _HOLES, wanted)
            for hit, (hole, _, _, _) in zip(wanted, candidates, strict=True):
                store_shared_where(hit, holes + place * 4, [hole])
                place = place + bool_to_int(hit)

        def fill_holes(candidates: Sequence[tuple[Value, Value, Value, Value]]) -> None:
            wanted = [
                there & _taken(threshold, key, column) for _, key, column, there in candidates
            ]
            place = _reserve(own, header + _MOVED, wanted)
            for hit, (_, key, column, _) in zip(wanted, candidates, strict=True):
                (hole,) = load_shared(holes + select(hit, place, i32(0)) * 4, "r")
                store_shared_where(hit, own.shared["kept"] + hole * PAIR, [key, column])
                place = place + bool_to_int(hit)

        buffer.walk(i32(0), left, find_holes)
        own.sync()
        buffer.walk(left, count, fill_holes)
        own.sync()
        self._histogram.clear()
        when(own.thread.equals(0), lambda: set_kept(own, left))
        own.sync()
        return threshold.key + 1

    def _write(self, share: Share, lowest: Value) -> None:
        """Writes the list of a share, its length, and where the lists of its row begin and end."""
        block, own = self._block, self._own
        count, top = kept(own)
        number = share.group.request + block.number
        line = block.array("pairs") + (number * CAPACITY).wide() * PAIR
        header = own.shared["header"]
        when(own.thread.equals(0), lambda: store_shared(header + _MOVED, [i32(0)]))
        own.sync()
        buffer = _Buffer(own, count)
        (bound,) = branch(
            count > own.shape.k + TILE,
            [i32(LOWEST)],
            lambda: self._bound(buffer, _least(lowest), top)[:1],
        )

        def put(candidates: Sequence[tuple[Value, Value, Value, Value]]) -> None:
            wanted = [there & key.at_least(bound) for _, key, _, there in candidates]
            place = _reserve(own, header + _MOVED, wanted)
            for hit, (_, key, column, _) in zip(wanted, candidates, strict=True):
                target = line + select(hit, place, i32(0)).wide() * PAIR
                when(hit, functools.partial(store_global, target, [key, column]))
                place = place + bool_to_int(hit)

        buffer.walk(i32(0), count, put)
        own.sync()
        (written,) = load_shared(header + _MOVED, "r")
        group = share.group

        def note() -> None:
            store_global(block.array("counts") + number.wide() * 4, [written])
            for name, edge, own_edge in (
                ("first", group.first, share.lower),
                ("last", group.first + group.tiles, share.upper),
            ):
                place = block.array(name) + group.request.wide() * 4
                when(own_edge.equals(edge), functools.partial(store_global, place, [number]))

        when(own.thread.equals(0), note)

    def _bound(self, buffer: _Buffer, least: Value, top: Value) -> Sequence[Value]:
        """A key that at least k reach, as a rule not many more, and how many do."""
        shift = coarse_shift(least, top)

        def count(groups: Sequence[Group]) -> None:
            for group in groups:
                for key in group.keys:
                    self._histogram.count((key - least) >> shift, key.at_least(least))

        buffer.each(count)
        self._own.sync()
        number, above, inside = self._histogram.find(i32(self._own.shape.k))
        return [least + (number << shift), above + inside]


def _least(lowest: Value) -> Value:
    """The least key that may be kept: some may equal the least of those that a cut has left."""
    return select(lowest.equals(LOWEST), lowest, lowest - 1)


def _reserve(own: topk.Block, counter: Value, wanted: Sequence[Value]) -> Value:
    """The first of as many places as this thread wants, by a counter in shared memory."""
    count = i32(0)
    for hit in wanted:
        count = count + bool_to_int(hit)
    return reserve(counter, count, sum_below(count, own.lane), own.lane)


def _taken(threshold: Threshold, key: Value, column: Value) -> Value:
    equal = key.equals(threshold.key) & (threshold.last >= column)
    return threshold.key.below(key) | equal


def keep(block: Block, k: int, number: int) -> None:
    """Keeps candidates of all shares of this block, by warpgroups of which this is one."""
    chooser = _Chooser(block, k, number)

    def one(share: Share, carry: list[Value]) -> list[Value]:
        return branch(share.upper > share.lower, carry, lambda: [chooser.keep(share, carry[0])])

    Schedule(block).for_each([i32(0)], one)
