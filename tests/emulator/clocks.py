"""What each warp of a block knows of the others' past: vector clocks.

Warps have clocks, which advance whenever they tell something to others. `seen[w, v]` is the last
tick of warp v whose accesses to memory are ordered before what warp w does next. Of its own, too: a
lane's accesses are ordered before those of the other lanes only by an instruction that says so.
`fenced` is the same for accesses that the tensor cores must see.
"""

import numpy as np

from tests.emulator.lanes import WARP


class Clocks:
    """The clocks of one block."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.now = np.ones(warps, np.int32)
        self._known = np.zeros((2, warps, warps), np.int32)
        self.seen, self.fenced = self._known

    def sync_warp(self, warp: int) -> None:
        """Its lanes have met."""
        self.seen[warp, warp] = self.now[warp]
        self.now[warp] += 1

    def release(self, warp: int, lanes: int) -> np.ndarray:
        """What follows from the word of so many lanes of a warp; see `acquire`.

        All lanes together speak for all accesses so far, one for those before they last met.
        """
        word = self._known[:, warp].copy()
        if lanes == WARP:
            word[0, warp] = self.now[warp]
        self.now[warp] += 1
        return word

    def acquire(self, warp: int, word: np.ndarray) -> None:
        """All lanes of a warp learn what others have released, joined by `np.maximum`."""
        np.maximum(self._known[:, warp], word, out=self._known[:, warp])

    def fence(self, warp: int) -> None:
        """What the warp has seen, and its lanes have done, is what the tensor cores see."""
        np.maximum(self.fenced[warp], self.seen[warp], out=self.fenced[warp])
        self.fenced[warp, warp] = self.now[warp]
        self.now[warp] += 1
