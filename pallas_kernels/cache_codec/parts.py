"""A run of a row's values in one encoding, as a thread reads and writes eight of them."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.cache_codec.chunk import CHUNK, Chunk
from pallas_kernels.cache_codec.places import Field, Row
from pallas_kernels.device.memory import load_global, store_global
from pallas_kernels.device.simt import Value, f32_type


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(abc.ABC):
    """Values `start` to `stop` of a row, multiples of 8.

    Attributes:
        start: the first value.
        stop: behind the last one.
    """

    start: int
    stop: int

    @property
    def lanes(self) -> int:
        """Neighbouring lanes whose chunks share a scale."""
        return 1

    def constants(self, bases: Mapping[str, Value]) -> Sequence[Value]:
        """What all rows share, loaded once by each thread."""
        return []

    def prepared(self, constants: Sequence[Value]) -> Any:
        """What `encode` makes of them, once for each thread."""
        return constants

    @property
    def whole_rows(self) -> bool:
        """Whether `of_row` gives something, for which a warp must take one row."""
        return False

    def of_row(self, loaded: Sequence[tuple[Value | None, Sequence[Value]]]) -> Sequence[Value]:
        """What all chunks of a row share, which `decode` gets after `constants`.

        All lanes of a warp call it.

        Args:
            loaded: what `load` gave this lane, each with whether it is of the row; None is yes.
        """
        return []

    @abc.abstractmethod
    def load(self, row: Row, chunk: Value) -> list[Value]:
        """What is stored of a chunk, by its number in this part: i32 or f32 registers."""

    @abc.abstractmethod
    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """The values of what `load` gave."""

    @abc.abstractmethod
    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """What is stored of values. All lanes of a warp call it, each with its chunk."""

    @abc.abstractmethod
    def store(self, row: Row, chunk: Value, stored: Sequence[Value]) -> None:
        """Stores what `encode` gave."""

    def adopt(
        self, other: "Part", stored: Sequence[Value], constants: Sequence[Value]
    ) -> list[Value] | None:
        """What `other` has stored, as this part stores it, where no value need be computed."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BF16Part(Part):
    """bf16 values.

    Attributes:
        values: where they are.
    """

    values: Field

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`."""
        return load_global(row.address(self.values) + chunk.wide() * (2 * CHUNK), "rrrr")

    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """See `Part.decode`."""
        return Chunk(stored)

    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """See `Part.encode`."""
        return list(values.pairs())

    def store(self, row: Row, chunk: Value, stored: Sequence[Value]) -> None:
        """See `Part.store`."""
        store_global(row.address(self.values) + chunk.wide() * (2 * CHUNK), stored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class F32Part(Part):
    """f32 values, that are read only.

    Attributes:
        values: where they are.
    """

    values: Field

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`."""
        address = row.address(self.values) + chunk.wide() * (4 * CHUNK)
        return [x for half in range(2) for x in load_global(address, "ffff", 16 * half)]

    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """See `Part.decode`."""
        assert stored[0].type == f32_type()
        return Chunk(stored)

    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """No cache keeps f32."""
        raise NotImplementedError("f32 rows are read only")

    def store(self, row: Row, chunk: Value, stored: Sequence[Value]) -> None:
        """No cache keeps f32."""
        raise NotImplementedError("f32 rows are read only")
