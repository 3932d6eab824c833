"""Which query, heads and keys a block serves."""

import math
from collections.abc import Mapping
from typing import Any

from pallas_kernels.device.memory import global_address, load_global
from pallas_kernels.device.row_formats import TILE, Part
from pallas_kernels.device.simt import Value, floor_divide, i32, minimum, select
from pallas_kernels.sparse_decode.tuning import Shape


class Task:
    """One share of the work, as one thread sees it.

    Attributes:
        shape: of the launch.
        arrays: references to the arrays in global memory.
        row: the query.
        split: which part of its keys.
        first_head: the first of its heads.
    """

    def __init__(self, shape: Shape, heads: int, arrays: Mapping[str, Any], index: Value) -> None:
        """Emits the numbers.

        Args:
            shape: of the launch.
            heads: that one block serves.
            arrays: references to the arrays in global memory.
            index: of the share; shares of one query are neighbours.
        """
        self.shape, self.arrays = shape, arrays
        tiles = math.ceil(shape.heads / heads)
        per_query = tiles * shape.splits
        self.row = index // per_query
        rest = index % per_query
        self.split = rest // tiles
        self.first_head = (rest % tiles) * heads

    def length(self) -> Value:
        """How many of the query's slots count."""
        if not self.shape.has_lengths:
            return i32(self.shape.topk)
        address = global_address(self.arrays["lengths"]) + self.row.wide() * 4
        return minimum(load_global(address, "r")[0], self.shape.topk)

    def key_blocks(self, length: Value) -> tuple[Value, Value]:
        """The range of blocks of keys that this block attends to; it may be empty."""
        first = self.split * self.shape.blocks_per_split
        used = floor_divide(length + (TILE - 1), TILE)
        return first, minimum(first + self.shape.blocks_per_split, used)

    def row_offset(self, part: Part, slot: Value) -> Value:
        """Bytes from the part of the first row to that of the row in `slot`, at least 0; wide."""
        if self.shape.pages is None:
            return slot.wide() * part.stride
        size, page_bytes = self.shape.pages
        place = (slot % size).wide() * part.stride + size * part.behind
        return (slot // size).wide() * page_bytes + place

    def result_row(self, head: Value) -> Value:
        """The place of a head's result among all results, wide."""
        row = self.row + self.split * self.shape.n
        return row.wide() * self.shape.heads + head.wide()


def row_or_first(slot: Value) -> Value:
    """A slot that exists, even in place of one that is masked."""
    return select(slot < 0, i32(0), slot)
