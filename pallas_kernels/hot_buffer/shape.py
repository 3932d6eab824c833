"""One swap: everything about it that is known before the kernel is compiled."""

import dataclasses
import math

from pallas_kernels.device.simt import Value

WORD = 32  # positions of a word of the set
GROUP = 4  # words of the set that have one count
MOST_ITEMS = 16384  # positions of a request in one swap, and slots: sixteen of a thread
SHARED_BYTES = (227 << 10) - 1024  # of a block, without what Mosaic takes
HEADER = 64  # words: sums of warps, two values of each


@dataclasses.dataclass(frozen=True)
class Shape:
    """The swap of one layer's requests.

    Attributes:
        requests: rows of the batch.
        positions: of each request.
        size: slots of a request that the LRU rule manages.
        newest: reserved slots after them.
        page_size: tokens of a page.
        max_pages: host pages of a request.
        num_pages: host pages that there are.
        max_buffer_pages: buffer pages of a request.
        num_buffer_pages: buffer pages that there are.
    """

    requests: int
    positions: int
    size: int
    newest: int
    page_size: int
    max_pages: int
    num_pages: int
    max_buffer_pages: int
    num_buffer_pages: int

    @property
    def slots(self) -> int:
        """Slots of a request, the reserved ones included."""
        return self.size + self.newest

    @property
    def context(self) -> int:
        """Positions of a request that may have a host page."""
        return self.max_pages * self.page_size

    def set_words(self, threads: int) -> int:
        """Words of a bit for each position: whole groups, as many for each of the threads."""
        groups = math.ceil(self.context / (WORD * GROUP * threads))
        return groups * GROUP * threads

    def shared_words(self, threads: int) -> dict[str, int]:
        """The parts of a block's shared memory, each a multiple of four words."""
        bits = self.set_words(threads)
        parts = {
            "header": HEADER,
            "bits": bits,
            "counts": bits // GROUP,
            # What the slots hold is not needed any more when the evictable ones are listed.
            "tokens": self.slots,
            "first": self.positions,
            "slot_of": self.positions,
            "bases": self.max_buffer_pages,
        }
        return {name: math.ceil(words / 4) * 4 for name, words in parts.items()}

    def shared_parts(self, threads: int, base: Value) -> dict[str, Value]:
        """The addresses of these parts, the first of which begins at `base`."""
        parts = {}
        for name, words in self.shared_words(threads).items():
            parts[name] = base
            base = base + 4 * words
        return parts
