"""The first of many equal scores: a walk along the row that ends where enough were found."""

from collections.abc import Sequence

from pallas_kernels.device.memory import or_shared
from pallas_kernels.device.simt import (
    Value,
    bool_to_int,
    branch,
    i32,
    loop,
    minimum,
    select,
)
from pallas_kernels.select_topk.block import BINS, Histogram
from pallas_kernels.select_topk.search import bits_address
from pallas_kernels.select_topk.sources import Group, Row


def take_equals(row: Row, equal: Value, need: Value) -> Value:
    """Sets the bits of the first `need` columns of keys that equal `equal`; how many there are.

    The row is read by one block, in tiles of no more groups than a histogram has bins.
    """
    block, size = row.block, row.block.shape.vector
    histogram = Histogram(block)

    def step(i: Value, taken: Value) -> Sequence[Value]:
        def take() -> Sequence[Value]:
            first = row.first(i)
            groups = row.load(first, checked=True)
            numbers = [(group.column - first) // size for group in groups]
            missing = need - taken
            own = i32(0)
            for group in groups:
                own = own + _count(group, equal)
            total = block.total(own)

            def find() -> Sequence[Value]:
                for group, number in zip(groups, numbers, strict=True):
                    for key in group.keys:
                        histogram.count(i32(BINS - 1) - number, key.equals(equal))
                block.sync()
                chosen, before, _ = histogram.find(missing)
                return [i32(BINS - 1) - chosen, missing - before]

            last, rest = branch(missing < total, [i32(BINS), i32(0)], find)
            for group, number in zip(groups, numbers, strict=True):
                allowed = select(number < last, i32(size), i32(0))
                allowed = select(number.equals(last), rest, allowed)
                bits, seen = i32(0), i32(0)
                for j, key in enumerate(group.keys):
                    hit = key.equals(equal)
                    bits = bits | select(hit & (seen < allowed), i32(1 << j), i32(0))
                    seen = seen + bool_to_int(hit)
                or_shared(*bits_address(block, group, bits))
            return [taken + minimum(total, missing)]

        return branch(taken < need, [taken], take)

    (taken,) = loop(0, row.tiles, [i32(0)], step)
    return taken


def _count(group: Group, equal: Value) -> Value:
    count = i32(0)
    for key in group.keys:
        count = count + bool_to_int(key.equals(equal))
    return count
