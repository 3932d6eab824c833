"""Which warpgroup runs, and which of its threads."""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tests.emulator.faults import Fault
from tests.emulator.lanes import LANES, WARP

if TYPE_CHECKING:
    from tests.emulator.block import Block
    from tests.emulator.copies import Copies
    from tests.emulator.products import Products

WARPS = LANES // WARP


class Warpgroup:
    """128 threads in step.

    Attributes:
        block: it belongs to, or the blocks of a cluster.
        index: among all of their warpgroups.
        rank: of its block in the cluster.
        number: in its block.
        threads: their numbers among those of all warpgroups.
        mask: which of them run.
        copies: that it has under way.
        products: the same.
        cluster_meetings: how often it has come to the cluster's barrier.
    """

    def __init__(self, block: "Block", index: int, copies: "Copies", products: "Products") -> None:
        self.block, self.index = block, index
        self.rank, self.number = divmod(index, block.warpgroups_of_one)
        self.copies, self.products = copies, products
        self.threads = np.arange(index * LANES, (index + 1) * LANES, dtype=np.uint32)
        self.mask = np.ones(LANES, bool)
        self.cluster_meetings = 0

    @contextlib.contextmanager
    def only(self, condition: np.ndarray) -> Iterator[bool]:
        """Within, threads run in which the condition holds, too; whether there are any."""
        before = self.mask
        self.mask = before & condition
        try:
            yield bool(self.mask.any())
        finally:
            self.mask = before

    def lanes_of_warps(self) -> list[tuple[int, int]]:
        """The warps of which lanes run, by their numbers among all, and how many lanes."""
        counts = self.mask.reshape(WARPS, WARP).sum(1)
        return [(self.index * WARPS + w, int(n)) for w, n in enumerate(counts) if n]

    def whole_warps(self, text: str) -> list[int]:
        """The warps that run.

        Raises:
            Fault: not all lanes of one take part in an instruction that wants them.
        """
        warps = self.lanes_of_warps()
        if any(lanes != WARP for _, lanes in warps):
            raise Fault(f"{text=} by some lanes of a warp: {warps=}")
        return [warp for warp, _ in warps]

    def expect_all(self, text: str) -> None:
        """Raises `Fault` unless all threads run."""
        if not self.mask.all():
            raise Fault(f"{text=} by {int(self.mask.sum())} threads: expected {LANES=}")


_local = threading.local()


def current() -> Warpgroup:
    """The one whose code runs."""
    return _local.warpgroup


def enter(warpgroup: Warpgroup) -> None:
    """This thread of Python runs a warpgroup from now on."""
    _local.warpgroup = warpgroup
