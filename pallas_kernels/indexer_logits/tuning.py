"""How a launch divides its work, from its shape alone."""

import dataclasses

from pallas_kernels.device import wgmma
from pallas_kernels.indexer_logits.shape import Shape

TILE = 128  # keys of a stage
PRODUCT = 64  # keys of a product
PRODUCTS = TILE // PRODUCT
QUERY_SLOTS = 2
MULTIPROCESSORS = 132
TILE_BYTES = TILE * wgmma.ROW_BYTES
COPIER_REGISTERS = 72
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
    """

    padded_heads: int
    queries: int
    sets: int
    scorers: int = 2
    stages: int = 8

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
        return -(-self.group * self.padded_heads // 32) * 32 * wgmma.ROW_BYTES

    @property
    def scorer_registers(self) -> int:
        """Of a thread that multiplies: what the launch gives all and the others leave."""
        warpgroups = self.scorers + 1
        given = _REGISTERS // warpgroups // 8 * 8
        return (warpgroups * given - COPIER_REGISTERS) // self.scorers // 8 * 8

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
    return Tuning(padded, queries, sets=1 if shape.queries <= queries else 2)
