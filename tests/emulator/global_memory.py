"""Global memory: the operands and the results of a launch."""

from collections.abc import Sequence

import numpy as np

from tests.emulator.faults import Fault
from tests.emulator.lanes import LANES
from tests.emulator.warpgroup import current

_SPACING = 36  # bits of an address within an array
_UNSET = 0xFF  # NaN in every format


class GlobalMemory:
    """Arrays far apart, so that an address outside of one is inside of none."""

    def __init__(
        self,
        operands: Sequence[np.ndarray],
        results: Sequence[np.ndarray],
        updated: Sequence[int] = (),
    ) -> None:
        """Copies the operands; those whose numbers are in `updated` may be stored to."""
        arrays = [*operands, *results]
        self.addresses = [(i + 1) << _SPACING for i in range(len(arrays))]
        self._sizes = [array.nbytes for array in arrays]
        self._first_result = len(operands)
        self._updated = frozenset(updated)
        self._bytes = []
        for array in arrays:
            padded = np.full(-(-array.nbytes // 16) * 16, _UNSET, np.uint8)
            self._bytes.append(padded)
        for array, padded in zip(operands, self._bytes, strict=False):
            padded[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def load(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """`count` words of each running thread [128, count]."""
        mask = current().mask
        loaded = np.full((LANES, count), 0xFFFFFFFF, np.uint32)
        loaded[mask] = self.read(addresses[mask], count)
        return loaded

    def read(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """`count` words from each address."""
        loaded = np.empty((len(addresses), count), np.uint32)
        for array, chosen, offsets in self._places(addresses, 4 * count):
            words = (offsets >> 2)[:, None] + np.arange(count)
            loaded[chosen] = self._bytes[array].view(np.uint32)[words]
        return loaded

    def expect(self, addresses: np.ndarray, sizes: np.ndarray) -> None:
        """Raises `Fault` if one of the ranges, of chunks of 16 bytes, is not inside an array."""
        if (sizes % 16).any() or not sizes.all():
            raise Fault(f"{sizes=}: expected multiples of 16")
        for at in (addresses, addresses + sizes.astype(np.uint64) - np.uint64(16)):
            self._places(at, 16)

    def load_byte(self, addresses: np.ndarray) -> np.ndarray:
        """A byte of each running thread."""
        mask = current().mask
        found, loaded = (
            np.full(int(mask.sum()), _UNSET, np.uint32),
            np.full(LANES, _UNSET, np.uint32),
        )
        for array, chosen, offsets in self._places(addresses[mask], 1):
            found[chosen] = self._bytes[array][offsets]
        loaded[mask] = found
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """`values` [128, count] of the running threads."""
        mask = current().mask
        for array, chosen, offsets in self._places(addresses[mask], 4 * values.shape[1]):
            self._expect_writable(array)
            words = (offsets >> 2)[:, None] + np.arange(values.shape[1])
            self._bytes[array].view(np.uint32)[words] = values[mask][chosen]

    def store_byte(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """The lowest byte of `values` [128] of the running threads."""
        mask = current().mask
        for array, chosen, offsets in self._places(addresses[mask], 1):
            self._expect_writable(array)
            self._bytes[array][offsets] = values[mask][chosen].astype(np.uint8)

    def _expect_writable(self, array: int) -> None:
        if array < self._first_result and array not in self._updated:
            raise Fault(f"{array=}: a store to an operand, the first {self._first_result}")

    def operand(self, number: int, like: np.ndarray) -> np.ndarray:
        """An operand as it is now, of the shape and type of `like`."""
        return self._bytes[number][: like.nbytes].view(like.dtype).reshape(like.shape)

    def results(self, shapes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The results, of the shapes and types of `shapes`."""
        filled = zip(self._bytes[self._first_result :], shapes, strict=True)
        return [data[: x.nbytes].view(x.dtype).reshape(x.shape) for data, x in filled]

    def _places(self, addresses: np.ndarray, size: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For each array: which of the addresses are in it, and their offsets."""
        if (addresses % np.uint64(size)).any():
            raise Fault(
                f"{addresses[addresses % np.uint64(size) != 0][0]=:#x}: misaligned, {size=}"
            )
        numbers = (addresses >> np.uint64(_SPACING)).astype(np.int64) - 1
        places = []
        for array in np.unique(numbers):
            chosen = numbers == array
            offsets = (addresses[chosen] & np.uint64((1 << _SPACING) - 1)).astype(np.int64)
            if not 0 <= array < len(self._sizes) or (offsets + size > self._sizes[array]).any():
                raise Fault(f"global array {array} at {offsets.max():#x}: out of bounds, {size=}")
            places.append((int(array), chosen, offsets))
        return places
