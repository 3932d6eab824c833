"""Where the blocks of the logits leave what they have kept, for those that join it."""

import dataclasses

from pallas_kernels.indexer_logits.tuning import TILE

CAPACITY = 6144  # candidates of a block for one row
BATCH = 4  # tiles of logits that are looked at together
CHOOSERS = 2  # warpgroups that do
HANDED_ON = 32  # tiles of logits between warpgroups
PAIR = 8  # bytes of a key and its column


@dataclasses.dataclass(frozen=True)
class Kept:
    """Lists of candidates: one for each row and block that has tiles of it.

    Rows and blocks ascend together along all tiles, so that the sum of their numbers tells lists
    apart.

    Attributes:
        rows: of the result.
        blocks: that score.
        k: largest that are looked for.
    """

    rows: int
    blocks: int
    k: int

    def __post_init__(self):
        # After a cut the next batch must fit.
        if self.k > CAPACITY - BATCH * TILE:
            raise ValueError(f"{self.k=}: expected at most {CAPACITY - BATCH * TILE}")

    @property
    def lists(self) -> int:
        """The places for lists; not all are used."""
        return self.rows + self.blocks - 1
