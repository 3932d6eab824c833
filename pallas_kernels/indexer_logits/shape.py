"""What a launch computes."""

import dataclasses

UNIT = 16  # bytes, in which the places of keys are counted
MOST_UNITS = (1 << 31) - 1
SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Keys:
    """Where keys and their scales lie.

    Attributes:
        pages: how many.
        page_size: keys of a page.
        page_bytes: from the keys of a page to those of the next, a multiple of 16.
        packed: scales lie behind the keys of their page; else in an array of their own, one after
            the other.
    """

    pages: int
    page_size: int
    page_bytes: int
    packed: bool

    @property
    def units(self) -> int:
        """Of the whole cache; at most `MOST_UNITS`."""
        return self.pages * self.page_bytes // UNIT


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a launch.

    Attributes:
        requests: each with keys of its own.
        queries: of a request.
        heads: of a query, 1 to 64.
        dim: of a key, 64 or 128.
        columns: of the result: positions of a request.
        keys: where they lie.
        max_pages: of a request; None for one request whose positions are the keys in order.
        has_starts: whether windows begin elsewhere than at the first position.
        first: keys at the start of a window whose logits are +inf.
        last: keys at its end, likewise.
        bf16: whether queries and keys are, and keys have no scales; else e4m3.
        longer_than: keys of a window that is scored: no logits of shorter ones are wanted.
    """

    requests: int
    queries: int
    heads: int
    dim: int
    columns: int
    keys: Keys
    max_pages: int | None
    has_starts: bool
    first: int = 0
    last: int = 0
    bf16: bool = False
    longer_than: int = 0

    @property
    def row_bytes(self) -> int:
        """Of a key, and of a head of a query."""
        return self.dim * (2 if self.bf16 else 1)
