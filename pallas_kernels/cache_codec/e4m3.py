"""e4m3 codes with a scale for each row's blocks, for the tensor, or without one."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.cache_codec.chunk import (
    CHUNK,
    Chunk,
    exp2_bits,
    group_amax,
    smallest_exponent,
)
from pallas_kernels.cache_codec.parts import Part
from pallas_kernels.cache_codec.places import Field, Row
from pallas_kernels.cache_codec.quotient import Divisor, TensorDivisor
from pallas_kernels.device.memory import (
    load_global,
    load_global_byte,
    store_global,
    store_global_byte,
)
from pallas_kernels.device.row_formats import e4m3_pairs
from pallas_kernels.device.simt import (
    Value,
    block_thread,
    divide,
    f32,
    fmax,
    i32,
    ptx,
    select,
    when,
)

_LIMIT = 0x43E00000  # 448
_SMALLEST_NORMAL = 1 << 23
_ONE = 0x3F800000
_NAN_BYTE, _NAN = 255, 0x7FC00000
_SUBNORMAL_POWER = 0x400000  # 2^-127


@dataclasses.dataclass(frozen=True, kw_only=True)
class E4M3Part(Part):
    """Codes; what is stored of a chunk is two words of codes, then its scale if it has one.

    Attributes:
        codes: where they are.
    """

    codes: Field

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`."""
        return load_global(row.address(self.codes) + chunk.wide() * CHUNK, "rr")

    def store(self, row: Row, chunk: Value, stored: Sequence[Value]) -> None:
        """See `Part.store`."""
        store_global(row.address(self.codes) + chunk.wide() * CHUNK, stored[:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPart(E4M3Part):
    """Codes of a tensor with one scale.

    Attributes:
        scale: the array that holds the scale; None is exactly 1.
    """

    scale: str | None

    def constants(self, bases: Mapping[str, Value]) -> Sequence[Value]:
        """See `Part.constants`: the scale."""
        return load_global(bases[self.scale], "f") if self.scale else []

    def prepared(self, constants: Sequence[Value]) -> TensorDivisor | None:
        """See `Part.prepared`."""
        return TensorDivisor.of(constants[0]) if constants else None

    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """See `Part.decode`."""
        floats = e4m3_floats(stored)
        return Chunk.rounded([x * constants[0] for x in floats] if constants else floats)

    def adopt(
        self, other: Part, stored: Sequence[Value], constants: Sequence[Value]
    ) -> list[Value] | None:
        """See `Part.adopt`; scales are not compared."""
        unscaled = isinstance(other, TensorPart) and other.scale is None and self.scale is None
        return list(stored) if unscaled else None

    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """See `Part.encode`."""
        if prepared is None:
            return e4m3_codes(values.floats())
        return prepared.signed(e4m3_codes(prepared.quotients(values)), values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPart(E4M3Part):
    """Codes with a scale for each block.

    Attributes:
        scale: where the scales are.
        block: values that share one.
    """

    scale: Field
    block: int

    @property
    def lanes(self) -> int:
        """See `Part.lanes`."""
        return self.block // CHUNK

    def _block_of(self, chunk: Value) -> Value:
        return chunk // self.lanes

    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """See `Part.decode`."""
        scale = self._scale_of(stored[2])
        return Chunk.rounded([x * scale for x in e4m3_floats(stored)])

    def store(self, row: Row, chunk: Value, stored: Sequence[Value]) -> None:
        """See `Part.store`; the first lane of a block stores the scale."""
        super().store(row, chunk, stored)
        first = (block_thread() & (self.lanes - 1)).equals(0)
        when(first, lambda: self._store_scale(row, self._block_of(chunk), stored[2]))

    def _scale_of(self, stored: Value) -> Value:
        return stored.as_f32()

    @abc.abstractmethod
    def _store_scale(self, row: Row, block: Value, scale: Value) -> None:
        """Stores a block's scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class F32ScalePart(BlockPart):
    """Codes with f32 scales.

    Attributes:
        pow2: whether scales are powers of two, or amax / 448.
        smallest_amax: what amax counts as if it is less; 0 makes a block of subnormal scale zeros.
        floor: the smallest exponent of a power of two.
    """

    pow2: bool
    smallest_amax: float
    floor: int

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`."""
        address = row.address(self.scale) + self._block_of(chunk).wide() * 4
        return [*super().load(row, chunk), *load_global(address, "r")]

    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """See `Part.encode`."""
        amax = group_amax(values.amax()[0], self.lanes)
        if self.pow2:
            exponent = smallest_exponent(amax, _LIMIT, self.floor)
            return [*scaled_codes(values, exponent), exp2_bits(exponent)]
        largest = fmax(amax.as_f32(), f32(self.smallest_amax))
        scale = divide(largest, f32(448.0)).as_i32()
        vanishes = scale < _SMALLEST_NORMAL
        divisor = Divisor.of_scale(scale, vanishes)
        codes = e4m3_codes([divisor.quotient(x) for x in values.floats()])
        return [*codes, select(vanishes, i32(0), scale)]

    def adopt(
        self, other: Part, stored: Sequence[Value], constants: Sequence[Value]
    ) -> list[Value] | None:
        """See `Part.adopt`: the scale of a tensor, and powers of two, are scales of a block."""
        if isinstance(other, TensorPart):
            return [*stored, constants[0].as_i32() if constants else i32(_ONE)]
        if not isinstance(other, F32ScalePart) or other.block != self.block:
            return None
        return list(stored) if other.pow2 or not self.pow2 else None

    def _store_scale(self, row: Row, block: Value, scale: Value) -> None:
        store_global(row.address(self.scale) + block.wide() * 4, [scale])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteScalePart(BlockPart):
    """Codes with bytes b for scales 2^(b - 127).

    Attributes:
        floor: the smallest exponent.
        padding: bytes of zeros behind a row's scales.
    """

    floor: int
    padding: int

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`."""
        address = row.address(self.scale) + self._block_of(chunk).wide()
        return [*super().load(row, chunk), load_global_byte(address)]

    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """See `Part.encode`."""
        exponent = smallest_exponent(group_amax(values.amax()[0], self.lanes), _LIMIT, self.floor)
        return [*scaled_codes(values, exponent), exponent + 127]

    def adopt(
        self, other: Part, stored: Sequence[Value], constants: Sequence[Value]
    ) -> list[Value] | None:
        """See `Part.adopt`."""
        same = isinstance(other, ByteScalePart) and other.block == self.block
        return list(stored) if same else None

    def _scale_of(self, stored: Value) -> Value:
        bits = select(stored.equals(0), i32(_SUBNORMAL_POWER), stored << 23)
        return select(stored.equals(_NAN_BYTE), i32(_NAN), bits).as_f32()

    def _store_scale(self, row: Row, block: Value, scale: Value) -> None:
        address = row.address(self.scale) + block.wide()
        store_global_byte(address, scale)
        if self.padding:
            last = (self.stop - self.start) // self.block - 1

            def pad() -> None:
                for i in range(1, self.padding + 1):
                    store_global_byte(address, i32(0), i)

            when(block.equals(last), pad)


def scaled_codes(values: Chunk, exponent: Value) -> list[Value]:
    """Two words of codes of the values times 2^-exponent."""
    factor = exp2_bits(i32(0) - exponent).as_f32()
    return e4m3_codes([x * factor for x in values.floats()])


def e4m3_codes(values: Sequence[Value]) -> list[Value]:
    """Codes of f32, four to a word: to nearest even, saturating; NaN is 0x7F."""
    text = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    return [ptx(text, *values[i : i + 4], out="r", pure=True)[0] for i in range(0, CHUNK, 4)]


def e4m3_floats(words: Sequence[Value]) -> list[Value]:
    """The f32 of two words of codes."""
    text = (
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
        "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
    )
    pairs = [pair for word in words[:2] for pair in e4m3_pairs(word)]
    return [x for pair in pairs for x in ptx(text, pair, out="ff", pure=True)]
