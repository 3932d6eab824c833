"""One block of a grid, or those of a cluster: memory, barriers and warpgroups."""

from collections.abc import Callable, Sequence

import numpy as np

import tests.emulator.accesses
import tests.emulator.arithmetic
import tests.emulator.cluster  # noqa: F401
from pallas_kernels.device.boxes import Box
from tests.emulator.barriers import Barriers
from tests.emulator.clocks import Clocks
from tests.emulator.copies import Copies
from tests.emulator.faults import Fault
from tests.emulator.global_memory import GlobalMemory
from tests.emulator.products import Products
from tests.emulator.scheduler import Scheduler
from tests.emulator.shared_memory import SharedMemory, Watcher
from tests.emulator.warpgroup import WARPS, Warpgroup, enter

REGISTERS = 512  # of a thread of each warpgroup, in sum


class Block:
    """A block while it runs, or the blocks of a cluster, which then share all of this.

    Attributes:
        memory: of the launch.
        shared: memory.
        clocks: of its warps.
        barriers: of both kinds.
        warpgroups: in order.
        number: in the grid.
        warpgroups_of_one: of one block.
        running: warpgroups of each block.
        registers: per thread, of the warpgroups that have said so.
        engine: the warp that stands for the copy engine.
        box_maps: what its numbers of maps stand for.
    """

    def __init__(
        self,
        number: int,
        memory: GlobalMemory,
        sizes: Sequence[int],
        warpgroups: int,
        *,
        seed: int,
        watchers: Sequence[Watcher],
        blocks: int = 1,
    ) -> None:
        self.number, self.memory, self.warpgroups_of_one = number, memory, warpgroups
        count = blocks * warpgroups
        self.engine = WARPS * count
        self.clocks = Clocks(self.engine + 1, couriers=blocks > 1)
        self.shared = SharedMemory(sizes, self.clocks, blocks)
        self.shared.watchers += watchers
        self._scheduler = Scheduler(seed)
        self.barriers = Barriers(self.shared, self.clocks, self._scheduler)
        self.warpgroups = [Warpgroup(self, i, Copies(), Products()) for i in range(count)]
        self.running = [warpgroups] * blocks
        self.registers: dict[int, int] = {}
        self.box_maps: list[tuple[int, Box]] = []

    def run(self, code: Callable[[], None]) -> None:
        """Every warpgroup runs the code."""

        def main(group: Warpgroup) -> None:
            enter(group)
            # Numbers may overflow, and NaN may be compared, without a word.
            with np.errstate(all="ignore"):
                code()
            group.copies.expect_none()
            group.products.expect_none()
            self.running[group.rank] -= 1

        self._scheduler.run(
            [
                (f"warpgroup {group.index}", lambda group=group: main(group))  # type: ignore[misc]
                for group in self.warpgroups
            ]
        )
        used = sum(self.registers.values()) // len(self.running)
        if used > REGISTERS or any(count % 8 for count in self.registers.values()):
            raise Fault(f"{self.registers=}: expected multiples of 8, in sum {REGISTERS=}")
