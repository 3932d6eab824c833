"""The end of a block: the softmax of all warps from those of each, and its results."""

import dataclasses
import math
from collections.abc import Sequence

from pallas_kernels.device.memory import load_global, load_shared, store_global, store_shared
from pallas_kernels.device.row_formats import pack_bf16
from pallas_kernels.device.simt import (
    WARPGROUP,
    Value,
    divide,
    exp2,
    f32,
    fmax,
    log2,
    over_quad,
    ptx,
    select,
    when,
)
from pallas_kernels.gqa_decode.block import FLOAT, NUMBERS, PADDING, Block
from pallas_kernels.gqa_decode.shape import MMA_ROWS, WARPS

_VECTOR = 4  # floats of one access


@dataclasses.dataclass(frozen=True)
class Partial:
    """A softmax over some keys, as one thread has it.

    Attributes:
        outputs: for each tile of 16 rows, four floats for each 8 columns.
        references: for each of the thread's rows, the logit, of base 2, whose weight is 1.
        totals: for each, the sum of the weights of the thread's own keys.
    """

    outputs: Sequence[Sequence[Value]]
    references: Sequence[Value]
    totals: Sequence[Value]

    @classmethod
    def empty(cls, tiles: int, size: int, reference: float) -> "Partial":
        """Over no keys."""
        rows = 2 * tiles
        outputs = [[f32(0.0)] * size for _ in range(tiles)]
        return cls(outputs, [f32(reference)] * rows, [f32(0.0)] * rows)

    def values(self) -> list[Value]:
        """What a loop carries."""
        outputs = [x for tile in self.outputs for x in tile]
        return [*outputs, *self.references, *self.totals]

    def with_values(self, values: Sequence[Value]) -> "Partial":
        """The reverse."""
        tiles, size, rows = len(self.outputs), len(self.outputs[0]), len(self.references)
        outputs = [values[size * tile : size * (tile + 1)] for tile in range(tiles)]
        rest = values[size * tiles :]
        return Partial(outputs, rest[:rows], rest[rows:])


def finish(block: Block, state: Partial) -> None:
    """Joins the softmaxes of the warps and stores the results."""
    totals = [over_quad(total, lambda a, b: a + b) for total in state.totals]
    _store_numbers(block, state.references, totals)
    # All warps are done with their rings, too, whose place the outputs take.
    ptx("bar.sync 0;", convergent=True)
    for tile, outputs in enumerate(state.outputs):
        for below in range(2):
            _store_outputs(block, outputs, state.references[2 * tile + below], tile, below)
    ptx("bar.sync 0;", convergent=True)
    _add_up(block)


def _store_numbers(block: Block, references: Sequence[Value], totals: Sequence[Value]) -> None:
    """By a thread for each row."""
    thread = block.thread

    def store() -> None:
        for i, (reference, total) in enumerate(zip(references, totals, strict=True)):
            tile, below = divmod(i, 2)
            row = thread.warp * block.tuning.rows + thread.quad
            place = block.numbers + row * (NUMBERS * FLOAT)
            offset = (MMA_ROWS * tile + 8 * below) * NUMBERS * FLOAT
            store_shared(place, [reference, total], offset)

    when(thread.column.equals(0), store)


def _joined(block: Block, row: Value) -> tuple[Value, Value]:
    """The reference and the sum of weights of a row of the block, over all warps."""
    place = block.numbers + row * (NUMBERS * FLOAT)
    stride = block.tuning.rows * NUMBERS * FLOAT
    numbers = [load_shared(place, "ff", warp * stride) for warp in range(WARPS)]
    top = numbers[0][0]
    for reference, _ in numbers[1:]:
        top = fmax(top, reference)
    total = f32(0.0)
    for reference, part in numbers:
        total = total + part * exp2(reference - top)
    return top, total


def _store_outputs(
    block: Block, outputs: Sequence[Value], reference: Value, tile: int, below: int
) -> None:
    """A warp's share of the outputs of one of the thread's rows.

    The columns 2c and 2c + 1 of the products are neighbouring eighths of a row.
    """
    thread, dim = block.thread, block.format.dim
    row = thread.quad + (MMA_ROWS * tile + 8 * below)
    top, total = _joined(block, row)
    factor = divide(exp2(reference - top) * 2.0**block.format.power, total)
    if block.format.has_scale:
        factor = factor * load_global(block.array("value_scale"), "f")[0]
    factor = select(total.equals(0.0), f32(0.0), factor)
    line = thread.warp * block.tuning.rows + row
    eighth = dim // 8
    place = block.outputs + (line * (dim + PADDING) + thread.column * (2 * eighth)) * FLOAT
    for side in range(2):
        own = [x * factor for x in outputs[2 * below + side :: 4]]
        for first in range(0, eighth, _VECTOR):
            offset = (eighth * side + first) * FLOAT
            store_shared(place, own[first : first + _VECTOR], offset)


def _add_up(block: Block) -> None:
    """The results, by all threads."""
    tuning, dim, shape = block.tuning, block.format.dim, block.shape
    stride = (dim + PADDING) * FLOAT
    part = block.split.wide() * block.results_of_a_part
    for first in range(0, tuning.rows * dim, WARPGROUP * _VECTOR):
        index = block.thread.index * _VECTOR + first
        row, column = index // dim, index % dim
        place = block.outputs + row * stride + column * FLOAT
        values = load_shared(place, "ffff")
        for warp in range(1, WARPS):
            more = load_shared(place, "ffff", warp * tuning.rows * stride)
            values = [x + y for x, y in zip(values, more, strict=True)]

        def store(row: Value = row, column: Value = column, values: list[Value] = values) -> None:
            number = part + block.result_place(block.first_row + row)
            at = number * dim + column.wide()
            if shape.splits > 1:
                store_global(block.array("out") + at * FLOAT, values)
            else:
                words = [pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3])]
                store_global(block.array("out") + at * 2, words)

        when(block.first_row + row < shape.rows, store)

    row = block.thread.index

    def store_lse() -> None:
        top, total = _joined(block, row)
        lse = select(total.equals(0.0), f32(-math.inf), (top + log2(total)) * math.log(2.0))
        number = part + block.result_place(block.first_row + row)
        store_global(block.array("lse") + number * FLOAT, [lse])

    when((row < tuning.rows) & (block.first_row + row < shape.rows), store_lse)
