"""The shared memory of a block, or of a cluster: what lies where, who may access it."""

import operator
from collections.abc import Callable, Sequence

import numpy as np

from tests.emulator.clocks import Clocks
from tests.emulator.faults import Fault
from tests.emulator.races import Races
from tests.emulator.warpgroup import current

ALIGNMENT = 1024
LARGEST = 227 * 1024  # of all arrays
REGION = 1 << 18  # of a block: what a descriptor addresses
_UNWRITTEN = 0x7FFFDEAD  # a NaN

_COMBINED: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "or": operator.or_,
    "max": max,
}

# Called with the bytes of an access, the addresses and the threads.
Watcher = Callable[[int, np.ndarray, np.ndarray], None]


class SharedMemory:
    """Arrays at multiples of 1024 bytes, with room between them that nothing may touch."""

    def __init__(self, sizes: Sequence[int], clocks: Clocks, blocks: int) -> None:
        used = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        if used > LARGEST:
            raise Fault(f"{used=} bytes of shared memory: {LARGEST=}")
        self.addresses: list[int] = []
        self._data = np.full(blocks * REGION // 4, _UNWRITTEN, np.uint32)
        self._known = np.zeros(blocks * REGION, bool)
        self._usable = np.zeros(blocks * REGION // 4, bool)
        end = ALIGNMENT
        for size in sizes:
            self.addresses.append(end)
            for first in range(end, len(self._known), REGION):
                self._usable[first // 4 : (first + size) // 4] = True
            end += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self.races = Races(len(self._data), clocks, self.describe)
        self.watchers: list[Watcher] = []

    def describe(self, address: int) -> str:
        """An address as an offset in an array."""
        rank, offset = divmod(address, REGION)
        at = sum(first <= offset for first in self.addresses) - 1
        place = f"shared array {at} at {offset - self.addresses[max(at, 0)]:#x}"
        return place if len(self._known) == REGION else f"{place} of block {rank}"

    def load(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """`count` words of each running thread [128, count]; noise of the others."""
        group = current()
        words = self.words(addresses, 4 * count)
        self._expect_known(words)
        self.races.read(words, group.threads[group.mask])
        loaded = np.full((len(addresses), count), _UNWRITTEN, np.uint32)
        loaded[group.mask] = self._data[words]
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """`values` [128, count] of the running threads."""
        group = current()
        words, stored = self.words(addresses, 4 * values.shape[1]), values[group.mask]
        alike = (self._data[words] == stored) & (self._known.view(np.uint32)[words] == 0x01010101)
        self.races.write(words, group.threads[group.mask], alike=alike)
        self.write(words, stored)

    def combine(self, addresses: np.ndarray, values: np.ndarray, how: str) -> np.ndarray:
        """Adds, joins or maximises words of the running threads, in the order of the threads.

        Returns:
            What each found there.
        """
        group = current()
        words = self.words(addresses, 4)
        self._expect_known(words)
        self.races.combine(words, group.threads[group.mask])
        found = np.full(len(addresses), _UNWRITTEN, np.uint32)
        before = []
        for word, value in zip(words[:, 0].tolist(), values[group.mask].tolist(), strict=True):
            old = int(self._data[word])
            before.append(old)
            self._data[word] = _COMBINED[how](old, value) & 0xFFFFFFFF
        found[group.mask] = before
        return found

    def write(self, words: np.ndarray, values: np.ndarray) -> None:
        """Sets words whose access has been checked, of which two threads may set one alike."""
        self._data[words] = values
        self._known.view(np.uint32)[words] = 0x01010101
        if (self._data[words] != values).any():
            raise Fault(f"{values=}: threads store different values in one place")

    def load_half(self, addresses: np.ndarray) -> np.ndarray:
        """16 bits of each running thread."""
        group = current()
        words, halves = self._halves(addresses)
        if not self._known[2 * halves].all():
            raise self._unwritten(2 * halves[~self._known[2 * halves]])
        self.races.read(words, group.threads[group.mask])
        loaded = np.full(len(addresses), _UNWRITTEN & 0xFFFF, np.uint16)
        loaded[group.mask] = self._data.view(np.uint16)[halves]
        return loaded

    def store_half(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """16 bits of each running thread."""
        group = current()
        words, halves = self._halves(addresses)
        self.races.write(words, group.threads[group.mask])
        self._data.view(np.uint16)[halves] = values[group.mask]
        self._known.view(np.uint16)[halves] = 0x0101

    def words(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The words [m, size // 4] of an access of `size` bytes by the running threads."""
        group = current()
        first = addresses[group.mask].astype(np.int64)
        if (first % size).any():
            raise Fault(f"{self.describe(int(first[first % size != 0][0]))}: misaligned, {size=}")
        others = (first // REGION != group.rank) & (first < len(self._known))
        if others.any():
            raise Fault(f"{self.describe(int(first[0]))}: {group.rank=} accesses another block")
        for watcher in self.watchers:
            watcher(size, first, group.threads[group.mask])
        words = (first >> 2)[:, None] + np.arange(size // 4)
        self._expect_usable(words)
        return words

    def moved(self, address: int, size: int) -> np.ndarray:
        """The words of `size` bytes that come from or go to another block."""
        if address % min(size, 16):
            raise Fault(f"{self.describe(address)}: misaligned, {size=}")
        words = (address >> 2) + np.arange(size // 4)
        self._expect_usable(words)
        return words

    def multiplied(self, addresses: np.ndarray) -> np.ndarray:
        """The words of operands of the tensor cores, by their addresses."""
        words = addresses >> 2
        self._expect_usable(words)
        self._expect_known(words)
        return self._data[words]

    def forget(self, words: np.ndarray) -> None:
        """What was in words that a copy is on its way to."""
        self._known.view(np.uint32)[words] = 0

    def reserve(self, address: int, size: int) -> None:
        """Keeps ordinary accesses from a barrier."""
        self._expect_usable(np.arange(address // 4, (address + size) // 4))
        self._usable[address // 4 : (address + size) // 4] = False

    def _halves(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask = current().mask
        halves = addresses[mask].astype(np.int64) >> 1
        if (addresses[mask] & 1).any():
            raise Fault(f"{addresses=}: misaligned, size 2")
        words = (halves >> 1)[:, None]
        self._expect_usable(words)
        return words, halves

    def _expect_usable(self, words: np.ndarray) -> None:
        if words.size and (words.min() < 0 or words.max() >= len(self._usable)):
            raise Fault(f"{words.min()=} {words.max()=}: outside of shared memory")
        usable = self._usable[words]
        if not usable.all():
            place = self.describe(4 * int(words[~usable][0]))
            raise Fault(f"{place}: in no array, or in a barrier")

    def _expect_known(self, words: np.ndarray) -> None:
        known = self._known.view(np.uint32)[words] == 0x01010101
        if not known.all():
            raise self._unwritten(4 * words[~known])

    def _unwritten(self, addresses: np.ndarray) -> Fault:
        place = self.describe(int(addresses.ravel()[0]))
        return Fault(f"{place} is read before anything was written there, or has landed")
