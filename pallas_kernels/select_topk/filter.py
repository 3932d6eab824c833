"""One pass over a long row, which keeps the scores that may be among the largest.

The bound is a guess from a sample. It costs time where it is bad, and never a score: the count says
whether enough passed it, and not more than there is room for.
"""

from collections.abc import Callable, Sequence

from pallas_kernels.device.simt import (
    Value,
    branch,
    divide,
    f32,
    i32,
    int_to_float,
    when,
)
from pallas_kernels.device.sync import arrive_cluster, wait_cluster
from pallas_kernels.select_topk.block import Block, Histogram
from pallas_kernels.select_topk.emit import write_marked
from pallas_kernels.select_topk.finish import mark_largest
from pallas_kernels.select_topk.keeping import (
    LOWEST,
    Bound,
    Keeper,
    bound_of_sample,
    largest,
    rank_and_room,
)
from pallas_kernels.select_topk.sources import Group, Row, load_group
from pallas_kernels.select_topk.tuning import Filtered


def select_filtered(block: Block, tuning: Filtered, part: Value) -> None:
    """The result of a window that is longer than k, by the blocks of a cluster."""
    row = Row(block, tuning.vectors, part, tuning.blocks)
    when(part.equals(0), lambda: block.clear("bits", block.shape.words(block.threads)))
    Histogram(block).clear()
    Keeper.clear(block)
    shared = tuning.blocks > 1
    if shared:
        arrive_cluster()
    block.sync()
    bound = Bound(
        *branch(
            i32(tuning.capacity) < block.window.length,
            [i32(LOWEST), i32(0)],
            lambda: [*_guess(block, tuning)],
        )
    )
    if shared:
        wait_cluster()
    keeper = Keeper.of(block, tuning.capacity, cluster=shared)

    def step(groups: Sequence[Group], top: Value) -> Sequence[Value]:
        keeper.append(lambda: groups, bound.key)
        return [largest(groups, top)]

    keeper.raise_top(row.fold([i32(0)], step)[0])
    if shared:
        arrive_cluster()
        wait_cluster()
    else:
        block.sync()

    def finish() -> None:
        whole = Row(block, tuning.vectors, i32(0), 1)
        mark_largest(block, bound, tuning.capacity, lambda: whole)
        block.sync()
        write_marked(block)

    # By the first block of the cluster, in which the keys are.
    when(part.equals(0), finish)


def _guess(block: Block, tuning: Filtered) -> Bound:
    """A key that a little more than k scores of the window reach, by a sample of vectors."""
    shape, window, size = block.shape, block.window, block.shape.vector
    loads = tuning.sampled * (4 // size)
    vectors = block.threads * loads
    first = (window.start + (size - 1)) // size
    whole = window.end // size - first
    # Vector j of the sample is j * whole / vectors of the window, without leaving 32 bits.
    step, rest = whole // vectors, whole % vectors
    under_way = []
    for i in range(loads):
        j = block.thread + i * block.threads
        place = first + j * step + (j * rest) // vectors
        under_way.append(load_group(block, place * size, checked=False))
    keys = [key for group in under_way for key in group().keys]

    def count(code: Callable[[Value], tuple[Value, Value]]) -> None:
        for key in keys:
            Histogram(block).count(*code(key))

    part = divide(f32(float(vectors * size)), int_to_float(window.length))
    return bound_of_sample(block, count, *rank_and_room(part, shape.k, tuning.capacity))
