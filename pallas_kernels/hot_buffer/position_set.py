"""The positions that a request asks for, as bits in shared memory, and their ranks among them."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.device.memory import load_shared, or_shared, store_shared
from pallas_kernels.device.simt import Value, count_bits, i32, select
from pallas_kernels.hot_buffer.shape import GROUP, WORD


@dataclasses.dataclass(frozen=True)
class PositionSet:
    """A bit for each position of a context, and for each group of words the bits before it.

    Attributes:
        bits: the address of the bits.
        counts: the address of the counts.
        context: positions from 0 that may be in the set.
        words: how many there are, as many groups for each thread.
        thread: this one.
        threads: of the block.
    """

    bits: Value
    counts: Value
    context: int
    words: int
    thread: Value
    threads: int

    @property
    def _groups(self) -> int:
        return self.words // (GROUP * self.threads)

    def clear(self) -> None:
        """No position is in the set after the next barrier."""
        for i in range(self._groups):
            place = self.thread + i * self.threads
            store_shared(self.bits + place * (4 * GROUP), [i32(0)] * GROUP)

    def add(self, position: Value, condition: Value) -> None:
        """Puts a position of the context into the set where the condition holds."""
        bit = select(condition, i32(1) << (position & (WORD - 1)), i32(0))
        word = select(condition, position >> 5, i32(0))
        or_shared(self.bits + word * 4, bit)

    def sizes(self) -> tuple[Value, list[Value]]:
        """How many positions are in this thread's groups, and in each; after a barrier."""
        first = self.bits + self.thread * (4 * GROUP * self._groups)
        counts, total = [], i32(0)
        for i in range(self._groups):
            count = i32(0)
            for word in load_shared(first, "r" * GROUP, 4 * GROUP * i):
                count = count + count_bits(word)
            counts.append(count)
            total = total + count
        return total, counts

    def store_counts(self, before: Value, counts: Sequence[Value]) -> None:
        """Keeps the counts that ranks need: those of `sizes` and what all threads before have."""
        place = self.counts + self.thread * (4 * self._groups)
        for i, count in enumerate(counts):
            store_shared(place, [before], 4 * i)
            before = before + count

    def rank(self, position: Value) -> Value:
        """How many positions of the set are before one; -1 for any number that is not in it."""
        known = position.below(self.context)
        word = select(known, position >> 5, i32(0))
        group, nth = word >> 2, word & (GROUP - 1)
        (rank,) = load_shared(self.counts + group * 4, "r")
        bit = i32(1) << (position & (WORD - 1))
        own = i32(0)
        for i, bits in enumerate(load_shared(self.bits + group * (4 * GROUP), "r" * GROUP)):
            here = nth.equals(i)
            own = select(here, bits, own)
            below = select(here, bits & (bit - 1), select(nth > i, bits, i32(0)))
            rank = rank + count_bits(below)
        present = known & ((own & bit).equals(0) ^ 1)
        return select(present, rank, i32(-1))
