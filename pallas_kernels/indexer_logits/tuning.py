"""How a launch divides its work, from its shape alone."""

import dataclasses

from pallas_kernels.device import wgmma
from pallas_kernels.indexer_logits.shape import Shape

TILE = 128  # keys of a stage
PRODUCT = 64  # keys of a product
PRODUCTS = TILE // PRODUCT
QUERY_SLOTS = 2
MULTIPROCESSORS = 132
_STAGE_BYTES = 8 * TILE * wgmma.ROW_BYTES  # of keys in shared memory
COPIER_REGISTERS = 72
CHOOSER_REGISTERS = 64
_REGISTERS = 512  # of a thread of each warpgroup, in sum
_MOST_COLUMNS = 128  # of a product: queries times heads
_MOST_QUERIES = 8  # of a product, whose windows are in registers


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How keys and queries are divided among warpgroups.

    Attributes:
        padded_heads: of a query, a multiple of 8; the weights of those that are added are 0.
        queries: of a product, whose columns are their heads.
        sets: of so many queries each that a block has at once. Each stage is read for all of them,
            by a warpgroup for each.
        scorers: warpgroups that multiply, a multiple of `sets`: they take turns at the stages.
        stages: of keys in shared memory.
        halves: of a key and of a head, if they take twice the 128 bytes of a row there.
        handed_on: tiles of logits in shared memory that wait for warpgroups that choose among
            them; 0 writes them to global memory.
        choosers: so many of these.
    """

    padded_heads: int
    queries: int
    sets: int
    scorers: int = 2
    stages: int = 8
    halves: int = 1
    handed_on: int = 0
    choosers: int = 0

    @property
    def columns(self) -> int:
        """Of a product."""
        return self.queries * self.padded_heads

    @property
    def group(self) -> int:
        """Queries that a block has at once."""
        return self.queries * self.sets

    @property
    def query_bytes(self) -> int:
        """Of the queries that a block has at once, in shared memory."""
        return self.halves * self.query_rows * wgmma.ROW_BYTES

    @property
    def query_rows(self) -> int:
        """Heads of the queries that a block has at once, and padding behind them."""
        return -(-self.group * self.padded_heads // 32) * 32

    @property
    def tile_bytes(self) -> int:
        """Of a stage: of all keys the first half, then the second one, if there are two."""
        return self.halves * TILE * wgmma.ROW_BYTES

    @property
    def scorer_registers(self) -> int:
        """Of a thread that multiplies: what the launch gives all and the others leave."""
        others = [COPIER_REGISTERS] + [CHOOSER_REGISTERS] * self.choosers
        warpgroups = self.scorers + len(others)
        given = _REGISTERS // warpgroups // 8 * 8
        return (warpgroups * given - sum(others)) // self.scorers // 8 * 8

    def groups(self, shape: Shape) -> int:
        """Of all requests."""
        return shape.requests * self.groups_of_request(shape)

    def groups_of_request(self, shape: Shape) -> int:
        """Of each request: one does not reach into the next."""
        return -(-shape.queries // self.group)

    def blocks(self, shape: Shape) -> int:
        """Of the grid: no more than run at once."""
        return min(MULTIPROCESSORS, self.groups(shape) * -(-shape.columns // TILE))


def choose(shape: Shape) -> Tuning:
    """The tuning, from measurements on an H200."""
    padded = -(-shape.heads // 8) * 8
    queries = min(shape.queries, _MOST_COLUMNS // padded, _MOST_QUERIES)
    halves = -(-shape.row_bytes // wgmma.ROW_BYTES)
    return Tuning(
        padded,
        queries,
        sets=1 if shape.queries <= queries else 2,
        stages=_STAGE_BYTES // (halves * TILE * wgmma.ROW_BYTES),
        halves=halves,
    )
