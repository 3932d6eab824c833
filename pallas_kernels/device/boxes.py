"""Copies of boxes of a matrix in global memory, which the copy engine makes on its own (TMA)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlib.mlir.dialects import llvm

from pallas_kernels.device.simt import Value, i64_type, ptx

SWIZZLE = 128  # bytes of a row of a box, whose chunks are xored as `wgmma.descriptor` takes them


@dataclasses.dataclass(frozen=True)
class Box:
    """Some neighbouring rows of a matrix, and 128 bytes of each.

    Attributes:
        rows: of the box.
        value_bytes: of one value.
        row_bytes: of a whole row of the matrix, without gaps.
    """

    rows: int
    value_bytes: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        """Of the box."""
        return self.rows * SWIZZLE


class Arrays(Mapping[str, Any]):
    """References to the arrays in global memory, under the names that blocks know them by."""

    def __init__(self, context: Any, references: Mapping[str, Any]) -> None:
        """`context` is that of Mosaic's launch."""
        self._context, self._references = context, references

    def __getitem__(self, name: str) -> Any:
        return self._references[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._references)

    def __len__(self) -> int:
        return len(self._references)

    def box_map(self, name: str, box: Box) -> Value:
        """The address of what tells the copy engine of boxes of a matrix, for `copy_box`."""
        return _box_map(self._context, self._references[name], box)


def _box_map(context: Any, reference: Any, box: Box) -> Value:
    # The host makes it at the launch. Mosaic has no other function that gives its address, and its
    # own copies cannot arrive at a barrier that is a word in shared memory.
    slice_shape = (box.rows, SWIZZLE // box.value_bytes)
    address = context._get_tma_desc(reference, (), None, slice_shape, SWIZZLE, None)
    return Value(llvm.ptrtoint(i64_type(), address))


def copy_box(destination: Value, box_map: Value, column: Value, row: Value, barrier: Value) -> None:
    """Begins to copy the box at a column and a row of a matrix.

    Args:
        destination: in shared memory; a multiple of 1024 if the box has 8 rows or more.
        box_map: from `Arrays.box_map`.
        column: the first, a number of values.
        row: the first.
        barrier: in shared memory, at which the bytes arrive; it must expect them.
    """
    ptx(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[$0], [$1, {$2, $3}], [$4];",
        destination,
        box_map,
        column,
        row,
        barrier,
    )
