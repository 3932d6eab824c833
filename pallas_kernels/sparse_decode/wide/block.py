"""What all warpgroups of a block know: where everything lies, and which part is theirs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pallas_kernels.device import wgmma
from pallas_kernels.device.boxes import Arrays
from pallas_kernels.device.memory import shared_address
from pallas_kernels.device.row_formats import COLUMNS, RANK, TILE, RowFormat
from pallas_kernels.device.simt import (
    WARPGROUP,
    Thread,
    Value,
    block_thread,
    ptx,
    scalar,
    select,
    when,
)
from pallas_kernels.device.sync import (
    BYTES,
    Barriers,
    Ring,
    arrive_cluster,
    proxy_fence,
    wait_cluster,
)
from pallas_kernels.sparse_decode.task import ROW_BYTES, KeySource, Task
from pallas_kernels.sparse_decode.tuning import SHARED_BYTES, WIDE_HEADS, Shape

PARTS = RANK // COLUMNS
STAGES = 2
SHARES = 4  # of the weights P of a block of keys, at most
PAIR = 2  # blocks that share the conversion of their rows
WARPS = 4  # of a warpgroup
CONSUMER_WARPS = 12
COLUMN_TILE = TILE * wgmma.ROW_BYTES  # bytes of 64 columns of 64 rows, keys or heads
TILE_BYTES = COLUMN_TILE * (PARTS + 1)
ROPE_TILE = COLUMN_TILE * PARTS
SCALES_BYTES = 16  # of a row


class SmallMemory(NamedTuple):
    """Byte offsets of the small arrays in shared memory.

    Attributes:
        rope: rotary values on their way to a stage.
        scales: block scales on their way.
        full: a stage's rows are there.
        empty: they are no longer needed, by either block of a pair.
        weighted: a share of a stage's weights P is there.
        query: the query is there.
        taken: what of it lay in the second stage is no longer needed there, in either block.
        factor: the outputs' factors are there.
        raised: per stage and warp of heads, whether its block raised the reference of any head.
        tokens: per stage and key two bf16: a logarithm added to its logits, -inf to mask it, and
            the factor that takes it out of the weights again. In the end, per head, the factor on
            the output.
        decay: per head, the factor on earlier weights, valid if `raised`. In the beginning the
            logits' factor.
        size: bytes of all.
    """

    rope: int
    scales: int
    full: int
    empty: int
    weighted: int
    query: int
    taken: int
    factor: int
    raised: int
    tokens: int
    decay: int
    size: int

    @classmethod
    def layout(cls) -> "SmallMemory":
        """Laid out one after the other."""
        sizes = [COLUMN_TILE, TILE * SCALES_BYTES]
        sizes += [BYTES * STAGES] * 2 + [BYTES * STAGES * SHARES] + [BYTES] * 3
        sizes += [4 * WARPS * STAGES]
        sizes += [4 * TILE * STAGES, 4 * WIDE_HEADS]
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += size
        return cls._make([*offsets, end])


MEMORY = SmallMemory.layout()


def is_converted(row_format: RowFormat) -> bool:
    """Whether rows become f16 on their way to a stage."""
    return row_format.dtype == "f16"


def held_tiles(row_format: RowFormat) -> int:
    """Tiles of 64 columns of the query that stay in registers, for want of shared memory."""
    return 4 if is_converted(row_format) else 0


def shared_bytes(
    row_format: RowFormat, keys: KeySource | None = None, *, paired: bool
) -> dict[str, int]:
    """The arrays in shared memory and their sizes."""
    sizes = {
        "query": TILE_BYTES - held_tiles(row_format) * COLUMN_TILE,
        "tiles": STAGES * TILE_BYTES,
        "small": MEMORY.size + (ROW_BYTES if keys else 0),
    }
    if is_converted(row_format):
        # Rows as they are stored, on their way to a stage.
        sizes["raw"] = TILE * RANK // (PAIR if paired else 1)
    if paired:
        sizes["weights"] = STAGES * COLUMN_TILE
    assert sum(-(-size // 1024) * 1024 for size in sizes.values()) <= SHARED_BYTES
    return sizes


class Block(Task):
    """One block, as one thread sees it."""

    def __init__(
        self,
        row_format: RowFormat,
        paired: bool,
        keys: KeySource | None,
        shape: Shape,
        shared: Mapping[str, Any],
        arrays: Arrays,
        number: Any,
    ) -> None:
        """Emits the addresses.

        Args:
            row_format: of the cache.
            paired: whether it shares its rows with the other block of a cluster.
            keys: where keys come from; None is a list for each query.
            shape: of the launch.
            shared: references to the arrays of `shared_bytes`.
            arrays: references to the arrays in global memory.
            number: of this block in the grid.
        """
        super().__init__(shape, WIDE_HEADS, arrays, scalar(number), keys)
        self.format, self.paired = row_format, paired
        if paired:
            self.rank = scalar(number) % PAIR
        # The second product begins with the first share of the weights. Pairs were faster when it
        # began with all of them.
        self.shares = 1 if paired else SHARES
        self.thread = Thread.current()
        self.query, self.tiles, self.small = (
            shared_address(shared[name]) for name in ("query", "tiles", "small")
        )
        if is_converted(row_format):
            self.raw = shared_address(shared["raw"])
        if paired:
            self._weights = shared_address(shared["weights"])
        self.row_place = self.small + MEMORY.size
        self.full = Barriers(self.small + MEMORY.full, STAGES)
        self.empty = Barriers(self.small + MEMORY.empty, STAGES)
        self.weighted = Barriers(self.small + MEMORY.weighted, STAGES * SHARES)
        self.query_ready = Barriers(self.small + MEMORY.query, 1)
        self.query_taken = Barriers(self.small + MEMORY.taken, 1)
        self.factor_ready = Barriers(self.small + MEMORY.factor, 1)

    def initialise(self) -> None:
        """By one thread of the block; all must meet afterwards."""

        sharers = PAIR if self.paired else 1

        def once() -> None:
            self.full.initialise(WARPS + (0 if is_converted(self.format) else WARPGROUP))
            self.empty.initialise(2 * WARPS * sharers)
            self.weighted.initialise(WARPS)
            self.query_ready.initialise(CONSUMER_WARPS)
            self.query_taken.initialise(WARPS * sharers)
            self.factor_ready.initialise(WARPS)

        when(block_thread().equals(0), once)
        self.keys.place_row(self.row_place)
        ptx("fence.mbarrier_init.release.cluster;")
        if self.paired:
            arrive_cluster()
        ptx("bar.sync 0;", convergent=True)

    def take_row(self) -> None:
        """By every warpgroup, before anything that depends on which query the block is for."""
        self.keys.take_row(self.row_place)

    def meet(self) -> None:
        """Waits for the other block of a pair to have its barriers."""
        if self.paired:
            wait_cluster()

    def leave(self) -> None:
        """Meets the other block of the pair: neither may end before the other's last arrival."""
        arrive_cluster()
        wait_cluster()

    def release(self, barriers: Barriers, index: Value | int) -> None:
        """This warp no longer needs what either block of a pair may write next."""
        if self.paired:
            barriers.arrive_warp_in_pair(index, self.thread)
        else:
            barriers.arrive_warp(index, self.thread)

    def query_tile(self, part: Value) -> Value:
        """The address of 64 columns of the query, before some of them are held in registers."""
        held = held_tiles(self.format)
        second_stage = self.tiles + TILE_BYTES
        first = select(part < held, second_stage, self.query - held * COLUMN_TILE)
        return first + part * COLUMN_TILE

    def tile(self, slot: Value) -> Value:
        """The address of a stage's rows."""
        return self.tiles + slot * TILE_BYTES

    def wait_for_rows(self, ring: Ring) -> None:
        """Until the tensor cores may read the rows of a stage."""
        self.full.wait(ring.slot, ring.phase)
        if not self.paired:
            # Converted rows were written by ordinary stores; blocks of a pair have had their fence.
            proxy_fence()

    def weights(self, slot: Value) -> Value:
        """The address of a stage's weights P."""
        if self.paired:
            # What they would replace may still be on its way to the other block.
            return self._weights + slot * COLUMN_TILE
        return self.tile(slot) + ROPE_TILE

    def head_row(self) -> Value:
        """The upper of the two heads that this thread has of a product."""
        return self.thread.warp * 16 + self.thread.quad
