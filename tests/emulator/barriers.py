"""Barriers in shared memory, and those with a number."""

import dataclasses

import numpy as np

from tests.emulator.clocks import Clocks
from tests.emulator.faults import Fault
from tests.emulator.lanes import WARP
from tests.emulator.scheduler import Scheduler
from tests.emulator.shared_memory import SharedMemory
from tests.emulator.warpgroup import WARPS, current

BYTES = 8


@dataclasses.dataclass
class _MemoryBarrier:
    """An mbarrier: phases of `count` arrivals and some bytes, and what those that wait learn."""

    count: int
    missing: int
    bytes: int
    phase: int
    word: np.ndarray
    released: np.ndarray


@dataclasses.dataclass
class _Meeting:
    """Threads at a named barrier."""

    threads: int
    came: int
    any_holds: bool
    word: np.ndarray


class Barriers:
    """All barriers of a block."""

    def __init__(self, shared: SharedMemory, clocks: Clocks, scheduler: Scheduler) -> None:
        self._shared, self._clocks, self._scheduler = shared, clocks, scheduler
        self._in_memory: dict[int, _MemoryBarrier] = {}
        self._meetings: dict[tuple[int, int], _Meeting] = {}
        self._of_cluster: list[_Meeting] = []

    def initialise(self, addresses: np.ndarray, count: int) -> None:
        for address in addresses[current().mask].tolist():
            self._shared.reserve(address, BYTES)
            nothing = self._nothing()
            self._in_memory[address] = _MemoryBarrier(count, count, 0, 0, nothing, nothing)

    def arrive(self, addresses: np.ndarray) -> None:
        """One arrival for each running thread."""
        group = current()
        warps = group.threads // WARP
        for warp, _ in group.lanes_of_warps():
            chosen = group.mask & (warps == warp)
            places, counts = np.unique(addresses[chosen], return_counts=True)
            for address, count in zip(places.tolist(), counts.tolist(), strict=True):
                barrier = self._at(address)
                while count:
                    if not barrier.missing:
                        place = self._shared.describe(address)
                        raise Fault(f"{place}: an arrival too many before {barrier.bytes=} came")
                    # Lanes whose arrival is for the next phase say nothing in this one.
                    lanes = min(count, barrier.missing)
                    word = self._clocks.release(warp, lanes)
                    barrier.word = np.maximum(barrier.word, word)
                    barrier.missing -= lanes
                    count -= lanes
                    self._complete(barrier)

    def expect(self, addresses: np.ndarray, size: int) -> None:
        """The phase waits for so many bytes more of each running thread."""
        for address in addresses[current().mask].tolist():
            self._at(address).bytes += size

    def receive(self, address: int, size: int, word: np.ndarray) -> None:
        """So many bytes have come, and what follows from their word."""
        barrier = self._at(address)
        barrier.bytes -= size
        barrier.word = np.maximum(barrier.word, word)
        self._complete(barrier)

    def _complete(self, barrier: _MemoryBarrier) -> None:
        if barrier.missing == 0 and barrier.bytes == 0:
            barrier.missing, barrier.phase = barrier.count, barrier.phase + 1
            barrier.released = barrier.word

    def wait(self, addresses: np.ndarray, parities: np.ndarray) -> None:
        """Until the phases of the parities have completed."""
        group = current()
        mask = group.mask
        places = {
            (address, parity): self._at(address)
            for address, parity in zip(
                addresses[mask].tolist(), parities[mask].tolist(), strict=True
            )
        }

        def late() -> list[tuple[int, int]]:
            return [key for key, barrier in places.items() if barrier.phase % 2 == key[1]]

        def reason() -> str:
            return " and ".join(
                f"the barrier in {self._shared.describe(address)}, {parity=}, of whose "
                f"{places[address, parity].count} arrivals {places[address, parity].missing} "
                f"are missing in phase {places[address, parity].phase}, "
                f"and {places[address, parity].bytes} bytes"
                for address, parity in late()
            )

        self._scheduler.wait_until(lambda: not late(), reason)
        for warp in group.whole_warps("mbarrier.try_wait"):
            first = (warp % WARPS) * WARP
            for address in np.unique(addresses[first : first + WARP]).tolist():
                self._clocks.acquire(warp, self._at(address).released)

    def meet(self, number: int, threads: int, holds: np.ndarray | None = None) -> bool:
        """Whether the condition holds in any of the threads that come to a named barrier."""
        group = current()
        warps = group.whole_warps("bar.sync")
        empty = _Meeting(threads, 0, False, self._nothing())
        meeting = self._meetings.setdefault((group.rank, number), empty)
        if meeting.threads != threads:
            raise Fault(f"barrier {number} for {threads=}: {meeting.threads=} wait there")
        for warp in warps:
            meeting.word = np.maximum(meeting.word, self._clocks.release(warp, WARP))
        meeting.came += WARP * len(warps)
        if holds is not None:
            meeting.any_holds |= bool(holds[group.mask].any())
        if meeting.came >= threads:
            del self._meetings[group.rank, number]
        if meeting.came > threads:
            raise Fault(f"{meeting.came=} threads at barrier {number}: expected {threads=}")
        self._scheduler.wait_until(
            lambda: meeting.came == threads,
            lambda: f"barrier {number}, to which {meeting.came} of {threads} threads have come",
        )
        for warp in warps:
            self._clocks.acquire(warp, meeting.word)
        return meeting.any_holds

    def arrive_cluster(self) -> None:
        """A warpgroup comes to the cluster's barrier, and goes on."""
        group = current()
        if len(self._of_cluster) == group.cluster_meetings:
            threads = WARP * WARPS * len(group.block.warpgroups)
            self._of_cluster.append(_Meeting(threads, 0, False, self._nothing()))
        meeting = self._of_cluster[group.cluster_meetings]
        for warp in group.whole_warps("barrier.cluster.arrive"):
            meeting.word = np.maximum(meeting.word, self._clocks.release(warp, WARP))
            meeting.came += WARP
        group.cluster_meetings += 1

    def wait_cluster(self) -> None:
        """Until all have come to where this warpgroup was last."""
        group = current()
        meeting = self._of_cluster[group.cluster_meetings - 1]
        self._scheduler.wait_until(
            lambda: meeting.came == meeting.threads,
            lambda: f"the cluster, of which {meeting.came} of {meeting.threads} threads have come",
        )
        for warp in group.whole_warps("barrier.cluster.wait"):
            self._clocks.acquire(warp, meeting.word)

    def _at(self, address: int) -> _MemoryBarrier:
        if address not in self._in_memory:
            raise Fault(f"{self._shared.describe(address)}: no barrier was initialised there")
        return self._in_memory[address]

    def _nothing(self) -> np.ndarray:
        return np.zeros((2, self._clocks.warps), np.int32)
