"""Boxes of a matrix, which the copy engine brings to shared memory."""

from typing import Any

import numpy as np

from pallas_kernels.device.boxes import SWIZZLE, Box
from tests.emulator import arith
from tests.emulator.faults import Fault
from tests.emulator.lanes import WARP, IntegerType, Lanes
from tests.emulator.mlir import Reference
from tests.emulator.warpgroup import current

CHUNK = 16  # bytes that the swizzle moves together
_PATTERN = 8  # rows, after which chunks lie in the same order again


def box_map(context: Any, reference: Reference, box: Box) -> Lanes:
    """A number that stands for the matrix and the box, in the block that asks."""
    maps = current().block.box_maps
    if (reference.address, box) not in maps:
        maps.append((reference.address, box))
    return arith.constant(IntegerType.get_signless(64), maps.index((reference.address, box)))


def copy(number: int, column: int, row: int, place: int, thread: int, barrier: int) -> None:
    """Copies a box to a place for a thread, and says so to a barrier.

    The engine is a warp of its own, which knows what the thread knows and writes as the tensor
    cores read. It writes at once, but only the barrier's word orders that before what others do.
    """
    block = current().block
    address, box = block.box_maps[number]
    if place % (min(box.rows, _PATTERN) * SWIZZLE):
        raise Fault(f"{block.shared.describe(place)}: misaligned for a box of {box.rows} rows")
    rows, chunks = np.arange(box.rows)[:, None], np.arange(SWIZZLE // CHUNK)[None]
    sources = address + (row + rows) * box.row_bytes + column * box.value_bytes + chunks * CHUNK
    values = block.memory.read(sources.ravel().astype(np.uint64), CHUNK // 4)
    line = place // SWIZZLE + rows
    places = line * SWIZZLE + ((chunks ^ (line % _PATTERN)) * CHUNK)
    words = ((places.ravel() >> 2)[:, None] + np.arange(CHUNK // 4)).reshape(1, -1)
    engine = block.engine
    block.clocks.acquire(engine, block.clocks.release(thread // WARP, 1))
    block.shared.races.write(words, np.array([engine * WARP]))
    block.shared.write(words, values.reshape(1, -1))
    block.clocks.fenced[engine, engine] = block.clocks.now[engine]
    block.barriers.receive(barrier, box.bytes, block.clocks.release(engine, WARP))
