"""Where the parts of a row lie in global memory."""

import dataclasses
from collections.abc import Mapping

from pallas_kernels.device.simt import Value


@dataclasses.dataclass(frozen=True)
class Field:
    """One part of every row.

    Attributes:
        array: name of the array.
        offset: bytes before the first row's part, in the array or in a page.
        stride: bytes from one row's part to the next one's.
    """

    array: str
    offset: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Pages:
    """Rows that lie in pages of their own stride.

    Attributes:
        size: rows of a page.
        stride: bytes of a page.
    """

    size: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as one thread finds it.

    Attributes:
        bases: addresses of the arrays.
        number: of the row; within the arrays.
        pages: how rows lie in pages, or None.
    """

    bases: Mapping[str, Value]
    number: Value
    pages: Pages | None

    def address(self, field: Field) -> Value:
        """Where the row's part begins."""
        base = self.bases[field.array]
        if self.pages is None:
            return base + (self.number.wide() * field.stride + field.offset)
        page, place = self.number // self.pages.size, self.number % self.pages.size
        within = place * field.stride + field.offset
        return base + (page.wide() * self.pages.stride + within.wide())
