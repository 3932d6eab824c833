"""Rows in registers: searched there, or some of them say which scores to keep for the search."""

import functools
from collections.abc import Callable

from pallas_kernels.device.memory import load_shared, store_shared
from pallas_kernels.device.simt import (
    Value,
    branch,
    i32,
    when,
)
from pallas_kernels.select_topk.block import Block, Histogram
from pallas_kernels.select_topk.emit import write_marked
from pallas_kernels.select_topk.finish import mark_largest
from pallas_kernels.select_topk.keeping import (
    LOWEST,
    Bound,
    Keeper,
    bound_of_sample,
    largest,
)
from pallas_kernels.select_topk.search import mark, search
from pallas_kernels.select_topk.sources import Registers, Row
from pallas_kernels.select_topk.tuning import Resident

_READ = 2  # vectors of a tile where the row must be read again


def select_resident(block: Block, tuning: Resident) -> None:
    """The result of a window that is longer than k."""
    source = Registers.load(block, tuning.vectors)
    block.clear("bits", block.shape.words(block.threads))
    Histogram(block).clear()
    if tuning.capacity:
        _by_sample(block, tuning, source)
    else:
        block.sync()
        mark(block, source, search(block, source, i32(LOWEST), i32(-1), i32(block.shape.k)))
    block.sync()
    write_marked(block)


def _by_sample(block: Block, tuning: Resident, source: Registers) -> None:
    """Some of the keys say which may be among the k largest."""
    Keeper.clear(block)
    # Each warp has another group in the sample, so that all of the row is in it. It waits in shared
    # memory, of which this part is not needed yet: there are no registers for it.
    chosen, size = (block.thread >> 5) % tuning.vectors, block.shape.vector
    place = block.shared["kept"] + block.thread * (4 * size)
    for i, group in enumerate(source.groups):
        store = functools.partial(store_shared, place, group.keys)
        when(chosen.equals(i), store)

    def count(code: Callable[[Value], tuple[Value, Value]]) -> None:
        for key in load_shared(place, "r" * size):
            Histogram(block).count(*code(key))

    expected = block.shape.k / tuning.vectors
    # A binomial count of that mean is above this once in millions, and then costs time alone.
    rank = int(expected + 5 * expected**0.5) + 8
    room = int(0.75 * tuning.capacity / tuning.vectors)
    block.sync()
    bound = Bound(
        *branch(
            i32(tuning.capacity) < block.window.length,
            [i32(LOWEST), i32(0)],
            lambda: [*bound_of_sample(block, count, i32(rank), i32(room))],
        )
    )
    keeper = Keeper.of(block, tuning.capacity, cluster=False)
    keeper.raise_top(largest(source.groups, i32(0)))
    keeper.append(lambda: source.groups, bound.key, few_registers=True)
    block.sync()
    mark_largest(block, bound, tuning.capacity, lambda: _row(block))


def _row(block: Block) -> Row:
    # With a window that is read again: there is no register to keep it in until here.
    return Row(block.with_window(), _READ, i32(0), 1)
