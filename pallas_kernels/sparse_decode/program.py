"""What a launch needs to know of a kind of block."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One kind of block, for one format of rows.

    Attributes:
        heads: of a query that one block serves.
        shared: the arrays in shared memory and their bytes.
        block: the block as one thread sees it, from the launch's shape, references to the arrays
            in shared and in global memory, and its number in the grid; it has `initialise`.
        roles: registers per thread and code of each warpgroup. The registers are multiples of 8,
            in sum at most 512: more would stop the kernel for ever.
    """

    heads: int
    shared: Mapping[str, int]
    block: Callable[[Any, Any, Any, Any], Any]
    roles: Sequence[tuple[int, Callable[[Any], None]]]
