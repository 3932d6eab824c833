"""What all warpgroups of a block know: where everything lies, and which part is theirs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pallas_kernels.device import wgmma
from pallas_kernels.device.boxes import Arrays
from pallas_kernels.device.memory import shared_address
from pallas_kernels.device.row_formats import TILE, RowFormat, Stage
from pallas_kernels.device.simt import (
    Thread,
    Value,
    block_thread,
    ptx,
    scalar,
    select,
    when,
)
from pallas_kernels.device.sync import BYTES, Barriers, Ring
from pallas_kernels.sparse_decode.task import ROW_BYTES, KeySource, Task
from pallas_kernels.sparse_decode.tuning import SHARED_BYTES, Shape, Tuning

CONSUMER_WARPS = 12
VALUES_WARPS = 8


class SmallMemory(NamedTuple):
    """Byte offsets of the small arrays in shared memory.

    Attributes:
        full: a stage's rows have landed.
        empty: they are no longer needed.
        weighted: a stage's weights P are there, in place of its rotary values.
        scored: the first product of a stage's rows is finished.
        query: the query is there.
        factor: the outputs' factors are there.
        flags: per stage, whether its block raised the reference of any head.
        scale: per head, the logits' factor.
        reference: per head, the logit whose weight is 1.
        decay: per stage and head, the factor on earlier weights, valid with the flag.
        partial: per warp and head, a sum or maximum on its way through the warpgroup.
        out_factor: per head, the factor on the output.
        size: bytes of all.
    """

    full: int
    empty: int
    weighted: int
    scored: int
    query: int
    factor: int
    flags: int
    scale: int
    reference: int
    decay: int
    partial: int
    out_factor: int
    size: int

    @classmethod
    def of(cls, tuning: Tuning) -> "SmallMemory":
        """Laid out one after the other."""
        stages, heads = tuning.stages, tuning.heads
        sizes = [BYTES * stages] * 4 + [BYTES] * 2
        sizes += [4 * stages, 4 * heads, 4 * heads, 4 * stages * heads, 16 * heads, 4 * heads]
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end = math.ceil((end + size) / 16) * 16
        return cls._make([*offsets, end])


def shared_bytes(
    row_format: RowFormat, tuning: Tuning, keys: KeySource | None = None
) -> dict[str, int]:
    """The arrays in shared memory and their sizes.

    Raises:
        ValueError: a block may not have that much.
    """
    rows = tuning.stages * tuning.rows
    sizes = {
        "nope": rows * row_format.nope_bytes,
        # Also the weights P of the rows, once their rotary values have been used: as keys only.
        "rope": rows * wgmma.ROW_BYTES,
        "tokens": rows * row_format.token_bytes,
        "query": tuning.heads * wgmma.ROW_BYTES * (row_format.parts + 1),
        "small": SmallMemory.of(tuning).size + (ROW_BYTES if keys else 0),
    }
    if row_format.rope_is_value:
        sizes["weights"] = rows * wgmma.ROW_BYTES
    total = sum(math.ceil(size / 1024) * 1024 for size in sizes.values())
    if total > SHARED_BYTES:
        raise ValueError(f"{tuning=} needs {total} bytes of shared memory: {SHARED_BYTES=}")
    return sizes


class Block(Task):
    """One block, as one thread sees it."""

    def __init__(
        self,
        row_format: RowFormat,
        tuning: Tuning,
        keys: KeySource | None,
        shape: Shape,
        shared: Mapping[str, Any],
        arrays: Arrays,
        number: Any,
    ) -> None:
        """Emits the addresses.

        Args:
            row_format: of the cache.
            tuning: of the block.
            keys: where keys come from; None is a list for each query.
            shape: of the launch.
            shared: references to the arrays of `shared_bytes`.
            arrays: references to the arrays in global memory.
            number: of this block in the grid.
        """
        super().__init__(shape, tuning.heads, arrays, scalar(number), keys)
        self.format, self.tuning = row_format, tuning
        self.thread = Thread.current()
        self.memory = SmallMemory.of(tuning)
        self.nope, self.rope, self.tokens, self.query, self.small = (
            shared_address(shared[name]) for name in ("nope", "rope", "tokens", "query", "small")
        )
        self.row_place = self.small + self.memory.size
        self.weights = shared_address(shared["weights"]) if "weights" in shared else self.rope

        def barriers(offset: int, count: int) -> Barriers:
            return Barriers(self.small + offset, count)

        self.full = barriers(self.memory.full, tuning.stages)
        self.empty = barriers(self.memory.empty, tuning.stages)
        self.weighted = barriers(self.memory.weighted, tuning.stages)
        self.scored = barriers(self.memory.scored, tuning.stages)
        self.query_ready = barriers(self.memory.query, 1)
        self.factor_ready = barriers(self.memory.factor, 1)

    def initialise(self) -> None:
        """By one thread of the block; all must meet afterwards."""
        warps = 4 // self.pieces

        def once() -> None:
            self.full.initialise(128 + 4)
            self.empty.initialise(VALUES_WARPS)
            self.weighted.initialise(warps)
            self.scored.initialise(warps)
            self.query_ready.initialise(CONSUMER_WARPS)
            self.factor_ready.initialise(4)

        when(block_thread().equals(0), once)
        self.keys.place_row(self.row_place)
        ptx("fence.mbarrier_init.release.cluster;")
        ptx("bar.sync 0;", convergent=True)

    def take_row(self) -> None:
        """By every warpgroup, before anything that depends on which query the block is for."""
        self.keys.take_row(self.row_place)

    @property
    def pieces(self) -> int:
        """Stages of a block of 64 keys."""
        return TILE // self.tuning.rows

    @property
    def tile_bytes(self) -> int:
        """No-position bytes of a stage."""
        return self.tuning.rows * self.format.nope_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of a stage's rotary values, and of its weights."""
        return self.tuning.rows * wgmma.ROW_BYTES

    @property
    def token_bytes(self) -> int:
        """Bytes that a stage keeps beside its rows."""
        return self.tuning.rows * self.format.token_bytes

    def stage(self, slot: Value, value_factors: Value) -> Stage:
        """The stage in a slot of the ring; `value_factors` are those of the first slot."""
        token_bytes = slot * self.token_bytes
        return Stage(
            self.nope + slot * self.tile_bytes,
            self.rope + slot * self.weight_bytes,
            self.tokens + token_bytes,
            value_factors + token_bytes,
        )

    def row_in_stage(self) -> Value:
        """The upper of the two keys whose logits this thread has."""
        return (self.thread.warp & (self.tuning.rows // 16 - 1)) * 16 + self.thread.quad

    def pieces_from(self, ring: Ring) -> list[Ring]:
        """The steps of the ring that hold the block of keys which begins at `ring`."""
        return [ring] if self.pieces == 1 else [ring, ring.next()]

    def own_piece(self, pieces: list[Ring]) -> Ring:
        """The one that holds this warp's keys."""
        if len(pieces) == 1:
            return pieces[0]
        upper = self.thread.warp < 2
        first, second = pieces
        slot, phase = (
            select(upper, x, y) for x, y in zip(first.values(), second.values(), strict=True)
        )
        return Ring(first.size, slot, phase)


def head_place(head: Value, heads: int) -> Value:
    """The byte offset of a head's float in `scale` and `reference`.

    The columns 8v + 2c and 8v + 2c + 1 of thread column c are consecutive over all v.
    """
    return (((head >> 1) & 3) * (heads // 4) + ((head >> 3) << 1) + (head & 1)) << 2
