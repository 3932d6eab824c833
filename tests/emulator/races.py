"""Accesses to shared memory that nothing orders, found whatever the order they came in.

For each word: the last write, and since then the last read and the last atomic access of each warp.
A write must be ordered after all of them, a read after the write and the atomic accesses, one of
these after the others (see `clocks`). Lanes of a warp count as unordered, too, until the warp has
met.
"""

from collections.abc import Callable

import numpy as np

from tests.emulator.clocks import Clocks
from tests.emulator.faults import Fault
from tests.emulator.lanes import WARP

UNFINISHED = 1 << 30  # the tick of what is still under way
_SEVERAL = -1  # lanes of a warp

Describe = Callable[[int], str]


class Races:
    """The accesses to the words of a block's shared memory."""

    def __init__(self, words: int, clocks: Clocks, describe: Describe) -> None:
        self._clocks, self._describe = clocks, describe
        self._write_tick = np.zeros(words, np.int32)
        self._write_warp = np.zeros(words, np.intp)
        self._write_lane = np.zeros(words, np.int16)
        self._read_tick = np.zeros((words, clocks.warps), np.int32)
        self._read_lane = np.zeros((words, clocks.warps), np.int16)
        self._atomic_tick = np.zeros((words, clocks.warps), np.int32)

    def combine(self, words: np.ndarray, threads: np.ndarray) -> None:
        """`threads` [m] access `words` [m, 1] atomically."""
        warps, lanes = _split(threads)
        self._expect_written(words, warps, lanes, "combines")
        self._expect_read(words, threads, "combines")
        self._atomic_tick[words, warps] = self._clocks.now[warps]

    def read(self, words: np.ndarray, threads: np.ndarray) -> None:
        """`threads` [m] read `words` [m, k]."""
        warps, lanes = _split(threads)
        self._expect_written(words, warps, lanes, "reads")
        self._expect_combined(words, threads, "reads")
        flat = words * self._clocks.warps + warps
        ticks, readers = self._read_tick.reshape(-1), self._read_lane.reshape(-1)
        others = readers[flat] != lanes
        others &= ticks[flat] > self._clocks.seen[warps, warps]
        readers[flat] = np.where(others, _SEVERAL, lanes)
        crowd = flat[readers[flat] != lanes]
        readers[crowd] = _SEVERAL
        ticks[flat] = self._clocks.now[warps]

    def write(
        self,
        words: np.ndarray,
        threads: np.ndarray,
        *,
        alike: np.ndarray | None = None,
        unfinished: bool = False,
    ) -> None:
        """`threads` [m] write `words` [m, k], or begin to; `alike` says what is there already.

        Lanes of a warp may write the same in any order.
        """
        warps, lanes = _split(threads)
        unordered = self._expect_written(words, warps, lanes, "writes", alike)
        self._expect_read(words, threads, "writes")
        self._expect_combined(words, threads, "writes")
        self._read_tick[words] = 0
        self._atomic_tick[words] = 0
        self._write_warp[words] = warps
        self._write_lane[words] = lanes
        self._write_lane[words[(self._write_lane[words] != lanes) | unordered]] = _SEVERAL
        self.finish_write(words, threads)
        if unfinished:
            self._write_tick[words] = UNFINISHED

    def finish_write(self, words: np.ndarray, threads: np.ndarray) -> None:
        """What they have begun to write is there."""
        self._write_tick[words] = self._clocks.now[_split(threads)[0]]

    def begin_product(self, words: np.ndarray, warps: range) -> None:
        """Tensor cores read `words` [m] for the `warps`, until `finish_product`."""
        ticks, writers = self._write_tick[words], self._write_warp[words]
        for known, what in (
            (self._clocks.seen, "is not ordered before this"),
            (self._clocks.fenced, "is not fenced for the tensor cores"),
        ):
            late = ticks > known[warps.start : warps.stop].min(axis=0)[writers]
            if late.any():
                i = int(np.nonzero(late)[0][0])
                why = f"a write by warp {writers[i]} {what}"
                self._fail(words[i], warps.start * WARP, "multiplies", why)
        self._read_tick[words, warps.start : warps.stop] = UNFINISHED
        self._read_lane[words, warps.start : warps.stop] = _SEVERAL

    def finish_product(self, words: np.ndarray, warps: range) -> None:
        """They have been read."""
        self._read_tick[words, warps.start : warps.stop] = self._clocks.now[
            warps.start : warps.stop
        ]

    def _expect_read(self, words: np.ndarray, threads: np.ndarray, what: str) -> None:
        """That all reads of the words are ordered before this."""
        warps, lanes = _split(threads)
        late = self._read_tick[words] > self._clocks.seen[warps]
        if late.any():
            own = np.arange(self._clocks.warps) == warps[..., None]
            late &= ~(own & (self._read_lane[words] == lanes[..., None]))
        if late.any():
            i, k, reader = (int(x[0]) for x in np.nonzero(late))
            self._fail(words[i, k], threads[i], what, f"has been read by warp {reader}")

    def _expect_combined(self, words: np.ndarray, threads: np.ndarray, what: str) -> None:
        """That all atomic accesses to the words are ordered before this."""
        late = self._atomic_tick[words] > self._clocks.seen[_split(threads)[0]]
        if late.any():
            i, k, warp = (int(x[0]) for x in np.nonzero(late))
            self._fail(words[i, k], threads[i], what, f"warp {warp} has accessed it atomically")

    def _expect_written(
        self,
        words: np.ndarray,
        warps: np.ndarray,
        lanes: np.ndarray,
        what: str,
        alike: np.ndarray | None = None,
    ) -> np.ndarray:
        """Which of the words other lanes of the warp have written alike meanwhile."""
        writers = self._write_warp[words]
        late = self._write_tick[words] > self._clocks.seen[warps, writers]
        if not late.any():
            return late
        lane = self._write_lane[words]
        late &= ~((writers == warps) & ((lane == lanes) | (lane == _SEVERAL)))
        unordered = np.zeros_like(late)
        if alike is not None:
            unordered = late & alike & (writers == warps)
            late &= ~unordered
        if late.any():
            i, k = (int(x[0]) for x in np.nonzero(late))
            thread = int(warps[i, 0]) * WARP + int(lanes[i, 0])
            under_way = self._write_tick[words[i, k]] == UNFINISHED
            state = "is still under way" if under_way else "is not ordered before this"
            why = f"a write by warp {writers[i, k]}, lane {lane[i, k]}, {state}"
            self._fail(words[i, k], thread, what, why)
        return unordered

    def _fail(self, word: int, thread: int, what: str, why: str) -> None:
        place = self._describe(4 * int(word))
        raise Fault(f"race: warp {thread // WARP}, lane {thread % WARP} {what} {place}: {why}")


def _split(threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = threads.astype(np.intp)[:, None]
    return wide // WARP, (wide % WARP).astype(np.int16)
