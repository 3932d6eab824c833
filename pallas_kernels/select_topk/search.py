"""The k-th largest key, found 12 bits at a time, and how far down the row its equals are taken."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pallas_kernels.device.memory import or_shared
from pallas_kernels.device.simt import (
    Value,
    bit_length,
    bool_to_int,
    branch,
    i32,
    loop,
    opaque,
    select,
)
from pallas_kernels.select_topk.block import BINS, DIGIT, Block, Histogram
from pallas_kernels.select_topk.shape import WORD
from pallas_kernels.select_topk.sources import Group, Source

ALL_COLUMNS = 2**31 - 1
_STEPS = 3  # of 12 bits, for keys of 32


class Threshold(NamedTuple):
    """What is taken: larger keys, and equal ones in columns up to the last.

    Attributes:
        key: that is compared with.
        last: column.
    """

    key: Value
    last: Value


def search(block: Block, source: Source, lowest: Value, highest: Value, need: Value) -> Threshold:
    """What takes exactly `need` of the keys between two bounds.

    The histogram must be empty, after a barrier.

    Args:
        block: whose threads all call it.
        source: of the keys.
        lowest: smaller keys are not looked at.
        highest: larger keys neither: they are taken besides.
        need: how many of those between, where no fewer are.
    """
    histogram = Histogram(block)
    shift = coarse_shift(lowest, highest)

    def narrow(
        _: Value,
        lowest: Value,
        shift: Value,
        limit: Value,
        need: Value,
        inside: Value,
        open_: Value,
    ) -> Sequence[Value]:
        def again() -> Sequence[Value]:
            def count(groups: Iterable[Group]) -> None:
                for key in _keys(groups):
                    offset = key - lowest
                    counts = key.at_least(lowest) & limit.at_least(offset)
                    histogram.count(offset >> shift, counts)

            number, above, inside = _count(block, source, count, need)
            missing = need - above
            ends = missing.equals(inside) | shift.equals(0)
            return [
                lowest + (number << shift),
                _less(shift, DIGIT),
                (i32(1) << shift) - 1,
                missing,
                inside,
                i32(1) - bool_to_int(ends),
            ]

        return branch(open_.equals(1), [lowest, shift, limit, need, inside, open_], again)

    start = [lowest, shift, highest - lowest, need, i32(0), i32(1)]
    key, _, _, need, inside, _ = loop(0, i32(_STEPS), start, narrow)
    (last,) = branch(
        need.equals(inside) ^ 1,
        [i32(ALL_COLUMNS)],
        lambda: [last_column(block, source, key, need)],
    )
    return Threshold(key, last)


def coarse_shift(lowest: Value, highest: Value) -> Value:
    """By how many bits the numbers between two must be shifted to be those of bins."""
    return _less(bit_length(highest - lowest), DIGIT)


def mark(block: Block, source: Source, threshold: Threshold) -> None:
    """Sets the bits of the columns that are taken."""

    def mark_groups(groups: Iterable[Group]) -> None:
        for group in groups:
            # One group after the other, or the registers do not suffice.
            bits, bound = i32(0), opaque(threshold.key)
            for i, key in enumerate(group.keys):
                equal = key.equals(bound) & (threshold.last >= group.column + i)
                taken = bound.below(key) | equal
                bits = bits | select(taken, i32(1 << i), i32(0))
            or_shared(*bits_address(block, group, bits))

    source.each(mark_groups)


def bits_address(block: Block, group: Group, bits: Value) -> tuple[Value, Value]:
    """The word in which the columns of a group have their bits, and these there."""
    address = block.shared["bits"] + ((group.column >> 5) << 2)
    return address, bits << (group.column & (WORD - 1))


def last_column(block: Block, source: Source, equal: Value, need: Value) -> Value:
    """The column of the `need`-th key, from the left, of those that equal `equal`."""
    histogram = Histogram(block)
    span = max(0, (block.shape.columns - 1).bit_length() - DIGIT)

    def count_spans(groups: Iterable[Group]) -> None:
        for column, key in _columns(groups):
            histogram.count(i32(BINS - 1) - (column >> span), key.equals(equal))

    number, above, _ = _count(block, source, count_spans, need)
    chosen = i32(BINS - 1) - number
    if span == 0:
        return chosen

    def count_columns(groups: Iterable[Group]) -> None:
        for column, key in _columns(groups):
            counts = key.equals(equal) & (column >> span).equals(chosen)
            histogram.count(i32(BINS - 1) - (column & ((1 << span) - 1)), counts)

    number, _, _ = _count(block, source, count_columns, need - above)
    return (chosen << span) + (i32(BINS - 1) - number)


def _count(
    block: Block, source: Source, count: Callable[[Iterable[Group]], None], need: Value
) -> Sequence[Value]:
    source.each(count)
    block.sync()
    return Histogram(block).find(need)


def _less(a: Value, b: int) -> Value:
    """a - b, but not below 0."""
    return select(a < b, i32(0), a - b)


def _keys(groups: Iterable[Group]) -> list[Value]:
    return [key for group in groups for key in group.keys]


def _columns(groups: Iterable[Group]) -> list[tuple[Value, Value]]:
    return [(group.column + i, key) for group in groups for i, key in enumerate(group.keys)]
