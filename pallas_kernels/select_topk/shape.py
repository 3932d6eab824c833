"""What one launch computes: everything about it that is known before the kernel is compiled."""

import dataclasses
import math

LARGEST_K = 4096  # positions of a result, which share their memory with the histogram
MOST_COLUMNS = 1 << 20  # one bit for each fits in shared memory
WORD = 32


@dataclasses.dataclass(frozen=True)
class PagedSlots:
    """Positions become slots: those of a page of the row's request.

    Attributes:
        page_size: tokens of a page.
        requests: rows of the page table.
        max_pages: columns of the page table.
        own_request: row `i` is of request `i`; otherwise an operand says which.
    """

    page_size: int
    requests: int
    max_pages: int
    own_request: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the arrays that the conversion reads."""
        return ("page_table",) if self.own_request else ("page_table", "requests")


@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Positions become rows of a buffer in which each row's tokens begin at an offset."""

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the arrays that the conversion reads."""
        return ("offsets",)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One launch.

    Attributes:
        rows: of scores.
        columns: of each.
        k: positions of a result.
        has_starts: whether each row's window has a start of its own.
        conversion: what positions become, or None.
    """

    rows: int
    columns: int
    k: int
    has_starts: bool
    conversion: PagedSlots | RaggedRows | None

    @property
    def vector(self) -> int:
        """Scores that one load takes: 4 if every row begins at a multiple of 16 bytes."""
        return 1 if self.columns % 4 else 4

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the arrays in the order of the kernel's arguments."""
        starts = ("starts",) if self.has_starts else ()
        extra = self.conversion.operands if self.conversion is not None else ()
        return ("scores", "lengths", *starts, *extra)

    def words(self, threads: int) -> int:
        """Words of a bit for each column, as many for each of the threads."""
        return math.ceil(self.columns / (WORD * threads)) * threads
