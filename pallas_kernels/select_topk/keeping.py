"""Scores that are kept in shared memory: from which on, and where."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from pallas_kernels.device.memory import (
    fetch_add_shared,
    load_shared,
    maximum_shared,
    store_shared,
    store_shared_where,
)
from pallas_kernels.device.simt import (
    WARP,
    Value,
    bool_to_int,
    branch,
    float_to_int,
    i32,
    maximum_of_warp,
    maximum_unsigned,
    opaque,
    select,
    shuffle,
    square_root,
    sum_below,
    when,
)
from pallas_kernels.device.sync import in_block
from pallas_kernels.select_topk.block import BINS, DIGIT, Block, Histogram
from pallas_kernels.select_topk.sources import Group

LOWEST = 1  # of all keys in a window
_COUNT, _TOP = 4 * 40, 4 * 41  # bytes into the header
_HIGH, _MIDDLE = 20, 8  # where the digits of a key begin, besides 0

# Counts the numbers of the keys of a sample for which a condition holds, both made from the key.
CountSample = Callable[[Callable[[Value], tuple[Value, Value]]], None]


class Bound(NamedTuple):
    """From where on scores are kept.

    Attributes:
        key: the least that is.
        tied: 1 if the key below has so many equals that there is no room for them, else 0.
    """

    key: Value
    tied: Value


def bound_of_sample(block: Block, count: CountSample, rank: Value, room: Value) -> Bound:
    """The `rank`-th largest key of a sample, to 12 bits, or more if too many share them.

    The histogram must be empty, after a barrier.

    Args:
        block: whose threads all call it.
        count: see `CountSample`.
        rank: no more than there are keys.
        room: how many keys of the sample may reach the bound.
    """
    histogram = Histogram(block)

    def find(code: Callable[[Value], tuple[Value, Value]], need: Value) -> Sequence[Value]:
        count(code)
        block.sync()
        return histogram.find(need)

    high, above, inside = find(lambda key: (key >> _HIGH, key.at_least(LOWEST)), rank)

    def refine() -> Sequence[Value]:
        middle, nearer, within = find(
            lambda key: ((key >> _MIDDLE) & (BINS - 1), (key >> _HIGH).equals(high)), rank - above
        )
        upper = (high << DIGIT) | middle
        before = above + nearer

        def finish() -> Sequence[Value]:
            low, nearest, equal = find(
                lambda key: (key & ((1 << _MIDDLE) - 1), (key >> _MIDDLE).equals(upper)),
                rank - before,
            )
            tied = bool_to_int(room < before + nearest + equal)
            return [((upper << _MIDDLE) | low) + tied, tied]

        crowded = room < before + within
        return branch(crowded, [upper << _MIDDLE, i32(0)], finish)

    key, tied = branch(room < above + inside, [high << _HIGH, i32(0)], refine)
    return Bound(select(key.below(LOWEST), i32(LOWEST), key), tied)


def rank_and_room(part: Value, k: int, capacity: int) -> tuple[Value, Value]:
    """What `bound_of_sample` is asked for, of a sample of that part of all keys."""
    expected = part * k
    # A binomial count of that mean is above this once in millions, and then costs time alone.
    rank = float_to_int(expected + square_root(expected) * 5.0) + 8
    return rank, float_to_int(part * (0.75 * capacity))


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Where keys and their columns are kept: in the first block of a cluster.

    Attributes:
        block: whose threads keep them.
        capacity: how many there is room for.
        header: the address of the counters.
        kept: the address of the first pair.
        space: how PTX calls the memory of these addresses.
    """

    block: Block
    capacity: int
    header: Value
    kept: Value
    space: str

    @classmethod
    def of(cls, block: Block, capacity: int, *, cluster: bool) -> "Keeper":
        """The block's own, or the one that its cluster shares."""
        header, kept = block.shared["header"], block.shared["kept"]
        if not cluster:
            return cls(block, capacity, header, kept, "shared")
        header, kept = in_block(header, i32(0)), in_block(kept, i32(0))
        return cls(block, capacity, header, kept, "shared::cluster")

    @staticmethod
    def clear(block: Block) -> None:
        """Nothing is kept in this block after its next barrier."""
        place = block.shared["header"] + _COUNT
        when(block.thread.equals(0), lambda: store_shared(place, [i32(0), i32(0)]))

    def append(
        self, groups: Callable[[], Iterable[Group]], lowest: Value, *, few_registers: bool = False
    ) -> None:
        """Keeps the keys from a bound on while there is room; counts all of them.

        Args:
            groups: gives the groups, as often as it is called.
            lowest: key.
            few_registers: asks each key twice whether it is kept, to save the answer's register.
        """

        def ask() -> Iterator[tuple[Value, Value, Value]]:
            bound = opaque(lowest) if few_registers else lowest
            for group in groups():
                for i, key in enumerate(group.keys):
                    yield key, group.column + i, key.at_least(bound)

        answers = None if few_registers else list(ask())

        def wanted() -> Iterable[tuple[Value, Value, Value]]:
            return answers or ask()

        count = i32(0)
        for _, _, hit in wanted():
            count = count + bool_to_int(hit)
        up_to = sum_below(count, self.block.lane)

        def store() -> None:
            place = reserve(self.header + _COUNT, count, up_to, self.block.lane, self.space)
            for key, column, hit in wanted():
                fits = hit & place.below(self.capacity)
                store_shared_where(fits, self.kept + (place << 3), [key, column], self.space)
                place = place + bool_to_int(hit)

        when(shuffle(up_to, WARP - 1).equals(0) ^ 1, store)

    def raise_top(self, top: Value) -> None:
        """The largest key is at least this thread's."""
        top = maximum_of_warp(top)
        place = self.header + _TOP
        when(self.block.lane.equals(0), lambda: maximum_shared(place, top, self.space))


def kept(block: Block) -> tuple[Value, Value]:
    """How many keys were wanted, and the largest of all keys, after a barrier."""
    count, top = load_shared(block.shared["header"] + _COUNT, "rr")
    return count, top


def reserve(
    counter: Value, count: Value, up_to: Value, lane: Value, space: str = "shared"
) -> Value:
    """The first of as many places as a thread wants, by one addition for the warp.

    Args:
        counter: the address of how many places are taken.
        count: how many this thread wants.
        up_to: `sum_below` of that.
        lane: this thread's.
        space: how PTX calls the memory of the counter.
    """
    (before,) = branch(
        lane.equals(WARP - 1), [i32(0)], lambda: [fetch_add_shared(counter, up_to, space)]
    )
    return shuffle(before, WARP - 1) + up_to - count


def set_kept(block: Block, count: Value) -> None:
    """So many are kept from the block's next barrier on; by one thread."""
    store_shared(block.shared["header"] + _COUNT, [count])


def largest(groups: Iterable[Group], top: Value) -> Value:
    """The largest key of these and `top`."""
    for group in groups:
        for key in group.keys:
            top = maximum_unsigned(top, key)
    return top
