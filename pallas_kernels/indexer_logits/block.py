"""What all warpgroups of a block know: where everything lies, and the barriers between them."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.device.memory import global_address, shared_address
from pallas_kernels.device.simt import (
    WARPGROUP,
    Thread,
    Value,
    block_thread,
    ptx,
    scalar,
    when,
)
from pallas_kernels.device.sync import BYTES, Barriers
from pallas_kernels.indexer_logits.shape import Shape
from pallas_kernels.indexer_logits.tuning import QUERY_SLOTS, TILE, Tuning

WARPS = 4  # of a warpgroup


def shared_bytes(tuning: Tuning) -> dict[str, int]:
    """The arrays in shared memory and their sizes."""
    scores = {"scores": tuning.handed_on * TILE * 4} if tuning.handed_on else {}
    return {
        "tiles": tuning.stages * tuning.tile_bytes,
        "queries": QUERY_SLOTS * tuning.query_bytes,
        "scales": tuning.stages * TILE * 4,
        "pages": tuning.stages * TILE * 4,
        **scores,
        "barriers": 2 * BYTES * (tuning.stages + QUERY_SLOTS + tuning.handed_on),
    }


class Block:
    """One block, as one thread sees it."""

    def __init__(
        self,
        shape: Shape,
        tuning: Tuning,
        shared: Mapping[str, Any],
        arrays: Mapping[str, Any],
        number: Any,
    ) -> None:
        """Emits the addresses.

        Args:
            shape: of the launch.
            tuning: of the launch.
            shared: references to the arrays of `shared_bytes`.
            arrays: references to the arrays in global memory.
            number: of this block in the grid.
        """
        self.shape, self.tuning = shape, tuning
        self.number = scalar(number)
        self.thread = Thread.current()
        self.shared = {name: shared_address(each) for name, each in shared.items()}
        self._arrays = arrays
        end = self.shared["barriers"]
        made = []
        for count in (tuning.stages, QUERY_SLOTS, tuning.handed_on):
            for _ in range(2):
                made.append(Barriers(end, count))
                end = end + count * BYTES
        self.full, self.empty, self.query_full, self.query_empty, *scores = made
        self.score_full, self.score_empty = scores

    def initialise(self) -> None:
        """By one thread of the block; all must meet afterwards."""

        def once() -> None:
            self.full.initialise(WARPGROUP)
            self.empty.initialise(WARPS * self.tuning.sets)
            self.query_full.initialise(WARPGROUP)
            self.query_empty.initialise(WARPS * self.tuning.scorers)
            self.score_full.initialise(WARPS)
            self.score_empty.initialise(WARPS)

        when(block_thread().equals(0), once)
        ptx("fence.mbarrier_init.release.cluster;")
        ptx("bar.sync 0;", convergent=True)

    def score_slot(self, index: Value) -> tuple[Value, Value]:
        """Where the logits of this block's tile of that number are handed on: slot and phase."""
        return index % self.tuning.handed_on, (index // self.tuning.handed_on) & 1

    def array(self, name: str) -> Value:
        """The address of an array in global memory."""
        return global_address(self._arrays[name])
