"""How a launch divides its work, from its shape alone."""

import dataclasses
import math

from pallas_kernels.select_topk.shape import Shape

WARPGROUP = 128
_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Resident:
    """One block holds a row in registers.

    Attributes:
        threads: of the block, a multiple of 128 and a power of two.
        vectors: loads of a thread.
        capacity: scores that can be kept in shared memory: those that a sample of the registers
            says may matter. 0: no sample, all of the search is in the registers.
    """

    threads: int
    vectors: int
    capacity: int
    blocks: int = dataclasses.field(default=1, init=False)


@dataclasses.dataclass(frozen=True)
class Filtered:
    """The blocks of a cluster read a row once, and keep what may be among the largest.

    Attributes:
        threads: of a block, a multiple of 128 and a power of two.
        blocks: that share a row.
        vectors: loads of a thread that are under way at once.
        capacity: scores that can be kept.
        sampled: loads of a thread for the sample.
    """

    threads: int
    blocks: int
    vectors: int
    capacity: int
    sampled: int


Tuning = Resident | Filtered


def choose(shape: Shape) -> Tuning:
    """The tuning, from measurements on an H200."""
    # A thread of 1024 has registers for 32 scores, or for 16 that are loaded one by one.
    if shape.columns <= 1024 * (32 if shape.vector > 1 else 16):
        return _resident(shape)
    capacity = 12288 if shape.k > 2560 else 8192
    if shape.columns > 1 << 19:  # whose bits take more of the shared memory
        capacity = min(capacity, 10240)
    sampled = min(4, max(1, shape.columns >> 17))
    for blocks in (8, 4, 2):
        if shape.rows * blocks <= _MULTIPROCESSORS:
            return Filtered(1024, blocks, 4, capacity, sampled)
    return Filtered(1024, 1, 4, capacity, sampled)


def _resident(shape: Shape) -> Resident:
    # Of many rows, two are on a multiprocessor at once.
    many = shape.rows >= 4 * _MULTIPROCESSORS
    threads = 256 if many and shape.columns <= 8192 and shape.vector > 1 else 1024
    vectors = math.ceil(shape.columns / (threads * shape.vector))
    sampled = threads == 1024 and vectors >= 4 and shape.columns >= 4 * shape.k
    capacity = min(12288, max(2048, 4 * shape.k)) if sampled else 0
    return Resident(threads, vectors, capacity)
