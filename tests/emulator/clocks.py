"""What each warp of a block, or of a cluster of them, knows of the others' past: vector clocks.

Warps have clocks, which advance whenever they tell something to others. `seen[w, v]` is the last
tick of warp v whose accesses to memory are ordered before what warp w does next. Of its own, too: a
lane's accesses are ordered before those of the other lanes only by an instruction that says so.
`fenced` is the same for accesses that the tensor cores must see.

In a cluster every warp has a courier with a clock of its own, which takes what it sends to others.
"""

import numpy as np

from tests.emulator.lanes import WARP


class Clocks:
    """The clocks of one block or cluster; `warps` counts couriers, too."""

    def __init__(self, warps: int, *, couriers: bool = False) -> None:
        self._first_courier = warps
        self.warps = warps = 2 * warps if couriers else warps
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

    def courier(self, warp: int, *, is_copy: bool) -> int:
        """The courier that leaves now; a copy reads memory as tensor cores do, behind a fence."""
        courier = self._first_courier + warp
        known = self.fenced[warp] if is_copy else self.seen[warp]
        np.maximum(self._known[:, courier], known, out=self._known[:, courier])
        return courier

    def delivered(self, courier: int, *, is_copy: bool) -> np.ndarray:
        """What follows from the courier's word; what a copy writes needs no fence."""
        word = self._known[:, courier].copy()
        word[0, courier] = self.now[courier]
        if is_copy:
            word[1, courier] = self.now[courier]
        self.now[courier] += 1
        return word

    def acquire(self, warp: int, word: np.ndarray) -> None:
        """All lanes of a warp learn what others have released, joined by `np.maximum`."""
        np.maximum(self._known[:, warp], word, out=self._known[:, warp])

    def fence(self, warp: int) -> None:
        """What the warp has seen, and its lanes have done, is what the tensor cores see."""
        np.maximum(self.fenced[warp], self.seen[warp], out=self.fenced[warp])
        self.fenced[warp, warp] = self.now[warp]
        self.now[warp] += 1
