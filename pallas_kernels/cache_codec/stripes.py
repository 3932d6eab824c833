"""What a warp does: rows in stripes of values that have one encoding before and one after.

A lane takes eight neighbouring values of a row. A warp takes a few rows: a stripe of all of them is
cut into units of eight values, 32 of which are a step. All loads of a warp are under way before the
first is waited for.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from pallas_kernels.cache_codec.chunk import CHUNK
from pallas_kernels.cache_codec.formats import Format
from pallas_kernels.cache_codec.parts import Part
from pallas_kernels.cache_codec.places import Row
from pallas_kernels.device.memory import load_global
from pallas_kernels.device.simt import WARP, Value, block_thread, f32, i32, select, shuffle, when


@dataclasses.dataclass(frozen=True)
class Stripe:
    """Values that one part of the source and one of the target hold.

    Attributes:
        source: the part of the source.
        target: the part of the target.
        start: the first value.
        stop: behind the last one.
    """

    source: Part
    target: Part
    start: int
    stop: int

    @property
    def chunks(self) -> int:
        """Units of a row."""
        return (self.stop - self.start) // CHUNK


def stripes(source: Format, target: Format) -> list[Stripe]:
    """Those of a row, in order."""
    found = []
    for before in source.parts:
        for after in target.parts:
            start, stop = max(before.start, after.start), min(before.stop, after.stop)
            if start < stop:
                found.append(Stripe(before, after, start, stop))
    return found


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Rows of one format that become rows of another.

    Attributes:
        source: the format.
        target: the format.
        source_bases: addresses of the arrays.
        target_bases: addresses of the arrays.
    """

    source: Format
    target: Format
    source_bases: Mapping[str, Value]
    target_bases: Mapping[str, Value]


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which row of a cache each row is, or goes to.

    Attributes:
        address: of the list, int32.
        size: rows of the cache; every other slot is none.
    """

    address: Value
    size: int


class Rows:
    """The rows of a warp, of which a lane asks by their number in it.

    Attributes:
        count: of rows, a power of two.
        masked: whether some source rows are read as zeros.
        checked: whether some rows are not stored.
    """

    def __init__(
        self, first: Value, count: int, end: int, source: Slots | None, target: Slots | None
    ) -> None:
        """Loads the slots.

        Args:
            first: number of the first row, which exists.
            count: how many rows.
            end: number of all rows.
            source: where rows come from; None is from the row of the same number.
            target: where they go.
        """
        self.count = count
        self.masked = source is not None
        self._ragged = end % count != 0
        self.checked = target is not None or self._ragged
        self._first, self._end = first, end
        row = first + (block_thread() & (count - 1))
        exists = row < end
        row = select(exists, row, first)
        self._slots: dict[str, Value] = {}
        for name, slots in (("source", source), ("target", target)):
            if slots is not None:
                (slot,) = load_global(slots.address + row.wide() * 4, "r")
                slot = select(slot.below(slots.size), slot, i32(-1))
                self._slots[name] = select(exists, slot, i32(-1)) if self._ragged else slot

    def source(self, row: Value) -> Value:
        """The slot of a row's source; -1 for zeros."""
        return self._slot("source", row)

    def target(self, row: Value) -> Value:
        """The slot of its target; -1 for none."""
        return self._slot("target", row)

    def _slot(self, name: str, row: Value) -> Value:
        if name in self._slots:
            return shuffle(self._slots[name], row)
        number = self._first + row
        return select(number < self._end, number, i32(-1)) if self._ragged else number


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Eight values of a row that a lane has loaded.

    Attributes:
        stripe: they are of.
        chunk: their number within the stripe.
        target: slot of the row they go to, -1 for none.
        stored: what was loaded.
        exists: whether there are such values; None is yes, in every lane.
        always: whether they go to a slot in any case.
    """

    stripe: Stripe
    chunk: Value
    target: Value
    stored: Sequence[Value]
    exists: Value | None
    always: bool


def convert(conversions: Sequence[Conversion], rows: Rows) -> None:
    """What each lane of a warp does."""
    loaded = [list(_load(conversion, rows)) for conversion in conversions]
    for conversion, units in zip(conversions, loaded, strict=True):
        constants = {
            part: [
                *part.constants(conversion.source_bases),
                *part.of_row([(u.exists, u.stored) for u in units if u.stripe.source is part]),
            ]
            for part in conversion.source.parts
        }
        prepared = {
            part: part.prepared(part.constants(conversion.target_bases))
            for part in conversion.target.parts
        }
        for unit in units:
            before, after = unit.stripe.source, unit.stripe.target
            stored = after.adopt(before, unit.stored, constants[before])
            if stored is None:
                values = before.decode(unit.stored, constants[before])
                stored = after.encode(values, prepared[after])
            _store(conversion, unit, stored)


def _load(conversion: Conversion, rows: Rows) -> Iterator[_Unit]:
    lane = block_thread() & (WARP - 1)
    for stripe in stripes(conversion.source, conversion.target):
        total = rows.count * stripe.chunks
        for first in range(0, total, WARP):
            unit = lane + first
            exists = None
            if total - first < WARP:
                exists = unit < total
                unit = select(exists, unit, i32(0))
            row, chunk = unit // stripe.chunks, unit % stripe.chunks
            source, target = rows.source(row), rows.target(row)
            missing = source < 0
            place = Row(
                conversion.source_bases, select(missing, i32(0), source), conversion.source.pages
            )
            stored = stripe.source.load(place, _within(chunk, stripe, stripe.source))
            if rows.masked:
                stored = [
                    select(missing, f32(0.0) if word.is_float else i32(0), word) for word in stored
                ]
            if exists is not None:
                target = select(exists, target, i32(-1))
            always = exists is None and not rows.checked
            yield _Unit(stripe, chunk, target, stored, exists, always)


def _store(conversion: Conversion, unit: _Unit, stored: Sequence[Value]) -> None:
    place = Row(conversion.target_bases, unit.target, conversion.target.pages)
    part = unit.stripe.target
    chunk = _within(unit.chunk, unit.stripe, part)
    if unit.always:
        part.store(place, chunk, stored)
    else:
        when(unit.target >= 0, lambda: part.store(place, chunk, stored))


def _within(chunk: Value, stripe: Stripe, part: Part) -> Value:
    return chunk + (stripe.start - part.start) // CHUNK
