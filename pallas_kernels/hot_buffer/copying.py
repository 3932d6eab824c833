"""Rows copied one by one from some arrays to others, by the lanes of a warp."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.device.memory import (
    load_global,
    load_global_byte,
    store_global,
    store_global_byte,
)
from pallas_kernels.device.simt import (
    WARP,
    Value,
    ballot,
    branch,
    count_bits,
    i32,
    loop,
    lowest_bit,
    select,
    shuffle,
    when,
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of rows, on both sides.

    Attributes:
        source: the address of the array that is read.
        target: the address of the array that is written.
        row_bytes: of one row, in both.
    """

    source: Value
    target: Value
    row_bytes: int

    @property
    def unit(self) -> int:
        """Bytes of one access: the most that divide a row."""
        return next(size for size in (16, 8, 4, 1) if self.row_bytes % size == 0)

    @property
    def units(self) -> int:
        """Accesses of one row."""
        return self.row_bytes // self.unit


@dataclasses.dataclass(frozen=True)
class _Access:
    """What a lane moves of one part: something of one row, or nothing.

    Attributes:
        part: of the rows.
        exists: whether it moves anything.
        source: bytes from the start of the array.
        target: likewise.
    """

    part: Part
    exists: Value
    source: Value
    target: Value

    def load(self) -> list[Value]:
        """Its words."""
        place, unit = self.part.source + self.source, self.part.unit

        def words() -> list[Value]:
            if unit == 1:
                return [load_global_byte(place)]
            return load_global(place, "r" * (unit // 4))

        return branch(self.exists, [i32(0)] * max(1, unit // 4), words)

    def store(self, words: Sequence[Value]) -> None:
        """Stores them."""
        place = self.part.target + self.target
        if self.part.unit == 1:
            when(self.exists, lambda: store_global_byte(place, words[0]))
        else:
            when(self.exists, lambda: store_global(place, words))


def copy_own_rows(
    parts: Sequence[Part], source: Value, target: Value, lane: Value, together: int
) -> None:
    """Copies the row of each lane of a warp that has one.

    Args:
        parts: the arrays.
        source: this lane's row in the arrays that are read; negative for none.
        target: its row in those that are written.
        lane: this one.
        together: rows whose loads are all under way before the first store.
    """
    left = ballot(source > -1)

    def body(_: Value, left: Value) -> Sequence[Value]:
        rows = []
        for _row in range(together):
            some = left.equals(0) ^ 1
            holder = select(some, lowest_bit(left), i32(0))
            rows.append((some, shuffle(source, holder), shuffle(target, holder)))
            left = left & (left - 1)
        moved = [each for part in parts for each in _accesses(part, rows, lane)]
        words = [each.load() for each in moved]
        for each, loaded in zip(moved, words, strict=True):
            each.store(loaded)
        return [left]

    loop(0, (count_bits(left) + (together - 1)) // together, [left], body)


def _accesses(
    part: Part, rows: Sequence[tuple[Value, Value, Value]], lane: Value
) -> Sequence[_Access]:
    """This lane's share of a part of some rows, whose accesses are dealt out to the lanes."""
    total = len(rows) * part.units
    found = []
    for first in range(0, total, WARP):
        place = lane + first
        nth = place // part.units
        exists, source, target = rows[0]
        for i, row in enumerate(rows[1:], 1):
            here = nth.equals(i)
            exists = select(here, row[0], exists)
            source = select(here, row[1], source)
            target = select(here, row[2], target)
        within = ((place - nth * part.units) * part.unit).wide()
        found.append(
            _Access(
                part,
                exists & (place < total),
                source.wide() * part.row_bytes + within,
                target.wide() * part.row_bytes + within,
            )
        )
    return found
