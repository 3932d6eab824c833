"""The k largest of a row, of the lists that the blocks of the logits have kept of it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

from pallas_kernels.device.memory import load_global, load_shared, maximum_shared, store_shared
from pallas_kernels.device.simt import (
    Value,
    branch,
    divide,
    either,
    f32,
    i32,
    int_to_float,
    loop,
    maximum_of_warp,
    maximum_unsigned,
    minimum,
    opaque,
    select,
    when,
)
from pallas_kernels.indexer_topk.shape import CAPACITY, PAIR, Kept
from pallas_kernels.select_topk.block import BINS, HEADER, Block, Histogram
from pallas_kernels.select_topk.emit import write_first, write_marked
from pallas_kernels.select_topk.keeping import (
    LOWEST,
    Keeper,
    bound_of_sample,
    largest,
    rank_and_room,
)
from pallas_kernels.select_topk.keeping import kept as kept_keys
from pallas_kernels.select_topk.search import mark, search
from pallas_kernels.select_topk.shape import Shape
from pallas_kernels.select_topk.sources import OUTSIDE, Group
from pallas_kernels.select_topk.sources import Kept as KeptKeys

_TOP, _BOTTOM = 4 * 42, 4 * 43  # bytes into the header
_HELD = 12288  # candidates that a block has in registers
_ROOM = 8192  # candidates that it has in shared memory where there are more
_AGAIN = 4  # loads of a thread at once there
_FEW = 8  # lists of which a thread looks at all


def shared_words(shape: Shape, kept: Kept, threads: int) -> dict[str, int]:
    """The parts of shared memory and their sizes."""
    return {
        "header": HEADER,
        "histogram": BINS,
        "bits": shape.words(threads),
        "offsets": -(-kept.blocks // 4) * 4,
        "kept": 2 * _ROOM,
    }


@dataclasses.dataclass(frozen=True)
class _Lists:
    """What is kept of a row.

    Attributes:
        block: of the selection.
        first: the number of the first list.
        lists: how many.
        most: of them.
        count: candidates of all.
    """

    block: Block
    first: Value
    lists: Value
    most: int
    count: Value

    def load(self, places: Sequence[Value], *, few: bool) -> list[Group]:
        """The candidates at some places of all; `few` if there are few lists."""
        where = (self._one_by_one if few else self._by_halves)(places)
        under_way = []
        for place, source in zip(places, where, strict=True):
            number = select(place < self.count, source + place, self.first * CAPACITY)
            under_way.append(load_global(self.block.arrays["pairs"] + number.wide() * PAIR, "rr"))
        return [
            Group(column, [select(place < self.count, key, i32(OUTSIDE))])
            for place, (key, column) in zip(places, under_way, strict=True)
        ]

    def each(self, body: Callable[[Iterable[Group]], None]) -> None:
        """See `Source`."""
        step = _AGAIN * self.block.threads

        def some(i: Value) -> list[Value]:
            begin = i * step + self.block.thread
            places = [begin + u * self.block.threads for u in range(_AGAIN)]
            body(self.load(places, few=False))
            return []

        loop(0, (self.count + (step - 1)) // step, [], some)

    def _offset(self, number: Value) -> Value:
        return load_shared(self.block.shared["offsets"] + number * 4, "r")[0]

    def _shift(self, number: Value, offset: Value) -> Value:
        """From a place among all candidates to that among all lists."""
        return (self.first + number) * CAPACITY - offset

    def _one_by_one(self, places: Sequence[Value]) -> list[Value]:
        def find(j: Value, *shifts: Value) -> list[Value]:
            offset = self._offset(j)
            own = self._shift(j, offset)
            pairs = zip(places, shifts, strict=True)
            return [select(place >= offset, own, shift) for place, shift in pairs]

        return loop(0, self.lists, [i32(0)] * len(places), find)

    def _by_halves(self, places: Sequence[Value]) -> list[Value]:
        shifts = []
        for place in places:
            number = i32(0)
            for bit in reversed(range((self.most - 1).bit_length())):
                further = number + (1 << bit)
                exists = further < self.lists
                offset = self._offset(select(exists, further, i32(0)))
                number = select(exists & (place >= offset), further, number)
            shifts.append(self._shift(number, self._offset(number)))
        return shifts


@dataclasses.dataclass(frozen=True)
class _Held:
    """Candidates in registers."""

    held: Sequence[Group]

    def each(self, body: Callable[[Iterable[Group]], None]) -> None:
        """See `Source`."""
        body(self.groups)

    @property
    def groups(self) -> Iterator[Group]:
        """What is held, anew: no register keeps what was computed of it for another use."""
        for group in self.held:
            yield Group(opaque(group.column), [opaque(key) for key in group.keys])


def join_row(kept: Kept, block: Block, part: Value) -> None:
    """The result of a row; `part` of a row is always the first."""
    del part
    whole = i32(block.shape.k) >= block.window.length
    when(whole, lambda: write_first(block))
    when(whole ^ 1, lambda: _join(kept, block))


def _join(kept: Kept, block: Block) -> None:
    row = block.window.row.wide() * 4
    (first,) = load_global(block.arrays["first"] + row, "r")
    (last,) = load_global(block.arrays["last"] + row, "r")
    block.clear("bits", block.shape.words(block.threads))
    Histogram(block).clear()
    Keeper.clear(block)
    header = block.shared["header"]
    when(block.thread.equals(0), lambda: store_shared(header + _TOP, [i32(0), i32(0)]))
    lists = _lists(kept, block, first, last - first + 1)

    def from_registers(few: bool) -> None:
        vectors = -(-_HELD // block.threads)
        places = [block.thread + u * block.threads for u in range(vectors)]
        _select(block, _Held(lists.load(places, few=few)))

    held = (i32(_HELD) >= lists.count) & (i32(_FEW) >= lists.lists)
    either(held, 0, lambda: from_registers(True), lambda: _by_sample(block, lists))
    block.sync()
    write_marked(block)


def _lists(kept: Kept, block: Block, first: Value, lists: Value) -> _Lists:
    """The lists of a row, whose offsets are in shared memory, after a barrier."""
    own = minimum(block.thread, lists - 1)
    (count,) = load_global(block.arrays["counts"] + (first + own).wide() * 4, "r")
    count = select(block.thread < lists, count, i32(0))
    up_to = block.sum_before(count)
    place = block.shared["offsets"] + block.thread * 4
    when(block.thread < lists, lambda: store_shared(place, [up_to]))
    total = block.shared["header"] + 4 * 32
    end = block.thread.equals(lists - 1)
    when(end, lambda: store_shared(total, [up_to + count]))
    block.sync()
    return _Lists(block, first, lists, kept.blocks, load_shared(total, "r")[0])


def _select(block: Block, source: _Held) -> None:
    header = block.shared["header"]
    top, reverse = i32(0), i32(0)
    for group in source.groups:
        for key in group.keys:
            top = maximum_unsigned(top, key)
            # Of what is no candidate the complement would be the largest.
            other = select(key.equals(OUTSIDE), i32(0), key ^ -1)
            reverse = maximum_unsigned(reverse, other)
    for place, value in ((_TOP, top), (_BOTTOM, reverse)):
        raise_ = functools.partial(maximum_shared, header + place, maximum_of_warp(value))
        when(block.lane.equals(0), raise_)
    block.sync()
    top, reverse = load_shared(header + _TOP, "rr")
    mark(block, source, search(block, source, reverse ^ -1, top, i32(block.shape.k)))


def _by_sample(block: Block, lists: _Lists) -> None:
    """Of many candidates, as of a long row: a sample says which may be among the largest."""
    k, taken = block.shape.k, _AGAIN * block.threads
    step, rest = lists.count // taken, lists.count % taken
    numbers = [block.thread + u * block.threads for u in range(_AGAIN)]
    # Place j of the sample is j * count / taken, without leaving 32 bits.
    sample = lists.load([n * step + (n * rest) // taken for n in numbers], few=False)

    def count(code: Callable[[Value], tuple[Value, Value]]) -> None:
        for group in sample:
            for key in group.keys:
                Histogram(block).count(*code(key))

    def guess() -> Sequence[Value]:
        part = divide(f32(float(taken)), int_to_float(lists.count))
        return [bound_of_sample(block, count, *rank_and_room(part, k, _ROOM)).key]

    (lowest,) = branch(i32(_ROOM) < lists.count, [i32(LOWEST)], guess)
    keeper = Keeper.of(block, _ROOM, cluster=False)

    def keep(groups: Iterable[Group]) -> None:
        groups = list(groups)
        keeper.raise_top(largest(groups, i32(0)))
        keeper.append(lambda: groups, lowest)

    lists.each(keep)
    block.sync()
    found, top = kept_keys(block)
    few = KeptKeys(block, found)
    either(
        found.at_least(k) & (i32(_ROOM) >= found),
        0,
        lambda: mark(block, few, search(block, few, lowest, top, i32(k))),
        lambda: mark(block, lists, search(block, lists, i32(LOWEST), top, i32(k))),
    )
