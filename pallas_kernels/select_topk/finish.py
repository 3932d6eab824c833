"""Once scores have been kept: the k largest of them, or of the row where that fails."""

from collections.abc import Callable, Sequence

from pallas_kernels.device.simt import Value, branch, either, i32, select, when
from pallas_kernels.select_topk.block import Block
from pallas_kernels.select_topk.keeping import LOWEST, Bound, kept
from pallas_kernels.select_topk.search import ALL_COLUMNS, Threshold, mark, search
from pallas_kernels.select_topk.sources import Kept, Row
from pallas_kernels.select_topk.ties import take_equals


def mark_largest(block: Block, bound: Bound, capacity: int, row_again: Callable[[], Row]) -> None:
    """Sets the bits of the k largest scores, after a barrier.

    Args:
        block: in which the scores from the bound on are.
        bound: a guess.
        capacity: how many there is room for.
        row_again: all of the scores, for where the guess was bad.
    """
    k = i32(block.shape.k)
    found, top = kept(block)
    enough, fits = found.at_least(k), i32(capacity) >= found
    few = Kept(block, found)

    def among_kept() -> None:
        mark(block, few, search(block, few, bound.key, top, k))

    def otherwise() -> None:
        missing, row = k - found, row_again()

        def take() -> Sequence[Value]:
            # Where none is kept, this reads what is there besides and marks nothing of it.
            mark(block, few, Threshold(bound.key - 1, i32(ALL_COLUMNS)))
            return [take_equals(row, bound.key - 1, missing)]

        (taken,) = branch(bound.tied.equals(1) & (enough ^ 1), [i32(-1)], take)

        def in_row() -> None:
            lowest = select(enough, bound.key, i32(LOWEST))
            mark(block, row, search(block, row, lowest, top, k))

        when(taken.equals(missing) ^ 1, in_row)

    either(enough & fits, 0, among_kept, otherwise)
