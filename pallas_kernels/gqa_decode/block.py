"""What the warps of a block know: where everything lies, and which part is theirs."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.device.memory import global_address, load_global, shared_address
from pallas_kernels.device.simt import (
    Thread,
    Value,
    i32,
    maximum,
    minimum,
    scalar,
    select,
)
from pallas_kernels.gqa_decode.formats import HeadFormat
from pallas_kernels.gqa_decode.shape import MMA_ROWS, WARPS, Shape, Tuning

FLOAT = 4
PADDING = 4  # floats beside a row of outputs, for other banks
NUMBERS = 2  # that each warp has of a row: its reference, its sum of weights


class StageMemory:
    """Byte offsets in one stage of a warp's ring: keys, values, their block scales; `size`."""

    def __init__(self, row_format: HeadFormat, tuning: Tuning) -> None:
        tile = tuning.keys * row_format.row_bytes
        scales = tuning.keys * row_format.scale_bytes
        self.keys, self.values = 0, tile
        self.key_scales, self.value_scales = 2 * tile, 2 * tile + scales
        self.size = 2 * (tile + scales)


def shared_bytes(row_format: HeadFormat, tuning: Tuning) -> dict[str, int]:
    """The arrays in shared memory and their sizes."""
    ring = WARPS * tuning.stages * StageMemory(row_format, tuning).size
    # In the end the warps' outputs take the place of the ring.
    outputs = WARPS * tuning.rows * (row_format.dim + PADDING) * FLOAT
    sizes = {
        "ring": max(ring, outputs),
        "numbers": WARPS * tuning.rows * NUMBERS * FLOAT,
    }
    if not tuning.query_in_registers:
        sizes["query"] = tuning.rows * row_format.dim * 2
    return sizes


class Block:
    """One block, as one thread sees it.

    Attributes:
        format: of the cache.
        tuning: of the block.
        shape: of the launch.
        arrays: references to the arrays in global memory.
        thread: this one.
        request: that the block serves.
        split: which part of its positions.
        kv_head: of the cache.
        first_row: of the rows of that request and head.
        context: the request's length.
    """

    def __init__(
        self,
        row_format: HeadFormat,
        tuning: Tuning,
        shape: Shape,
        shared: Mapping[str, Any],
        arrays: Mapping[str, Any],
        number: Any,
    ) -> None:
        """Emits the numbers and addresses.

        Args:
            row_format: of the cache.
            tuning: of the block.
            shape: of the launch.
            shared: references to the arrays of `shared_bytes`.
            arrays: references to the arrays in global memory.
            number: of this block in the grid; those of the same keys are neighbours, then those
                of the same positions.
        """
        self.format, self.tuning, self.shape, self.arrays = row_format, tuning, shape, arrays
        self.thread = Thread.current()
        self.memory = StageMemory(row_format, tuning)
        tiles = -(-shape.rows // tuning.rows)
        index = scalar(number)
        self.first_row = (index % tiles) * tuning.rows
        index = index // tiles
        self.kv_head = index % shape.kv_heads
        index = index // shape.kv_heads
        self.split = index % shape.splits
        self.request = index // shape.splits

        ring = shared_address(shared["ring"])
        self.outputs = ring
        self.ring = ring + self.thread.warp * (tuning.stages * self.memory.size)
        self.numbers = shared_address(shared["numbers"])
        self.query = shared_address(shared["query"]) if "query" in shared else None
        address = self.array("seq_lens") + self.request.wide() * 4
        self.context = maximum(load_global(address, "r")[0], 0)

    def array(self, name: str) -> Value:
        """The address of an array in global memory."""
        return global_address(self.arrays[name])

    def reach(self, row: Value) -> Value:
        """How many positions the token of a row attends to; less than 1 for none."""
        shape, context = self.shape, self.context
        if shape.causal and shape.tokens > 1:
            context = context - (shape.tokens - 1) + row // shape.group
        return minimum(context, shape.longest)

    def steps(self) -> tuple[Value, Value]:
        """The range of steps of this block, of `Tuning.block_keys` positions; it may be empty.

        Parts are equal parts of a request's own length, so that results depend on nothing but the
        request.
        """
        unit = self.tuning.block_keys
        last_row = minimum(self.first_row + self.tuning.rows, self.shape.rows) - 1
        used = (minimum(self.context, self.shape.longest) + (unit - 1)) // unit
        per_split = (used + (self.shape.splits - 1)) // self.shape.splits
        first = self.split * per_split
        own = (maximum(self.reach(last_row), 0) + (unit - 1)) // unit
        return first, minimum(first + per_split, own)

    def first_key(self, step: Value) -> Value:
        """Of those that this warp takes in a step."""
        return step * self.tuning.block_keys + self.thread.warp * self.tuning.keys

    def slot_of(self, step: Value, end: Value) -> Value:
        """Where the cache has the position of this lane in a step; -1 for none.

        Lanes beyond the step's keys have those of the first lanes. A page that is not one of the
        cache is masked.
        """
        shape = self.shape
        place = self.first_key(step) + (self.thread.lane & (self.tuning.keys - 1))
        entry = minimum(place // shape.page_size, shape.max_pages - 1)
        table = self.array("page_table") + self.request.wide() * (4 * shape.max_pages)
        (page,) = load_global(table + entry.wide() * 4, "r")
        exists = (place < end) & page.below(shape.num_pages)
        return select(exists, page * shape.page_size + place % shape.page_size, i32(-1))

    def own_rows(self) -> list[Value]:
        """The rows whose logits this thread has, two of each tile; some may not exist."""
        return [
            self.first_row + self.thread.quad + (MMA_ROWS * tile + 8 * below)
            for tile in range(self.tuning.tiles)
            for below in range(2)
        ]

    def result_place(self, row: Value) -> Value:
        """The number of a row among all that have results in one part, wide."""
        shape = self.shape
        token = self.request * shape.tokens + row // shape.group
        head = self.kv_head * shape.group + row % shape.group
        return token.wide() * shape.heads + head.wide()

    @property
    def results_of_a_part(self) -> int:
        """Rows of all requests and heads."""
        return self.shape.requests * self.shape.tokens * self.shape.heads
