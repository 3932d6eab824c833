"""Latents before RMSNorm and RoPE, as values that are normalised or rotated on their way."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.cache_codec.chunk import CHUNK, Chunk
from pallas_kernels.cache_codec.parts import BF16Part, F32Part, Part
from pallas_kernels.cache_codec.places import Field, Row
from pallas_kernels.device.memory import load_global
from pallas_kernels.device.simt import (
    WARP,
    Value,
    divide,
    f32,
    fma,
    select,
    shuffle_xor,
    square_root_rounded,
)

_PAIRS = CHUNK // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawPart(Part):
    """Values that are computed with, in f32, and rounded to the dtype that they came in.

    Attributes:
        values: as they are stored.
    """

    values: BF16Part | F32Part

    def _rounded(self, floats: Sequence[Value]) -> Chunk:
        return Chunk.rounded(floats) if isinstance(self.values, BF16Part) else Chunk(floats)

    def encode(self, values: Chunk, prepared: Any) -> list[Value]:
        """No cache keeps raw latents."""
        raise NotImplementedError("raw latents are read only")

    def store(self, row: Row, chunk: Value, stored: Sequence[Value]) -> None:
        """No cache keeps raw latents."""
        raise NotImplementedError("raw latents are read only")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormPart(RawPart):
    """Values that are divided by their root mean square and multiplied by gains.

    Attributes:
        gain: the gains, as a part of every row.
        eps: what is added to the mean square.
    """

    gain: BF16Part | F32Part
    eps: float

    @property
    def whole_rows(self) -> bool:
        """See `Part.whole_rows`: a mean is one of a row."""
        return True

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`: the values, then their gains."""
        return [*self.values.load(row, chunk), *self.gain.load(row, chunk)]

    def of_row(self, loaded: Sequence[tuple[Value | None, Sequence[Value]]]) -> Sequence[Value]:
        """See `Part.of_row`: 1 / sqrt(mean square + eps)."""
        total = f32(0.0)
        for exists, stored in loaded:
            squares = f32(0.0)
            for x in self._values(stored).floats():
                squares = fma(x, x, squares)
            total = total + (squares if exists is None else select(exists, squares, f32(0.0)))
        distance = WARP // 2
        while distance:
            total = total + shuffle_xor(total, distance)
            distance //= 2
        mean = divide(total, f32(float(self.stop - self.start)))
        return [divide(f32(1.0), square_root_rounded(mean + self.eps))]

    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """See `Part.decode`."""
        (factor,) = constants
        values, gains = self._values(stored), Chunk(stored[len(self._values(stored).raw) :])
        pairs = zip(values.floats(), gains.floats(), strict=True)
        return self._rounded([x * factor * gain for x, gain in pairs])

    def _values(self, stored: Sequence[Value]) -> Chunk:
        return Chunk(stored[: CHUNK if isinstance(self.values, F32Part) else _PAIRS])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryPart(RawPart):
    """Values of which pairs are rotated.

    Attributes:
        cos: f32, of each pair's angle.
        sin: f32, likewise.
        interleaved: whether pairs are neighbours; else their second values are the second half.
    """

    cos: Field
    sin: Field
    interleaved: bool

    def load(self, row: Row, chunk: Value) -> list[Value]:
        """See `Part.load`: cosines and sines, the values, then those that they are paired with."""
        if self.interleaved:
            angles = [
                x
                for field in (self.cos, self.sin)
                for x in load_global(row.address(field) + chunk.wide() * (4 * _PAIRS), "ffff")
            ]
            return [*angles, *self.values.load(row, chunk)]
        half = (self.stop - self.start) // CHUNK // 2
        second = chunk.at_least(half)
        pair = select(second, chunk - half, chunk)
        partner = select(second, pair, chunk + half)
        angles = []
        for field in (self.cos, self.sin):
            address = row.address(field) + pair.wide() * (4 * CHUNK)
            angles += [x for i in range(2) for x in load_global(address, "ffff", 16 * i)]
        sines = [select(second, x, x * -1.0) for x in angles[CHUNK:]]
        values = [self.values.load(row, each) for each in (chunk, partner)]
        return [*angles[:CHUNK], *sines, *values[0], *values[1]]

    def decode(self, stored: Sequence[Value], constants: Sequence[Value]) -> Chunk:
        """See `Part.decode`."""
        count = _PAIRS if self.interleaved else CHUNK
        cos, sin, values = stored[:count], stored[count : 2 * count], stored[2 * count :]
        if not self.interleaved:
            middle = len(values) // 2
            mine, others = Chunk(values[:middle]).floats(), Chunk(values[middle:]).floats()
            return self._rounded([mine[i] * cos[i] + others[i] * sin[i] for i in range(CHUNK)])
        x = Chunk(values).floats()
        rotated = []
        for i in range(_PAIRS):
            even, odd = x[2 * i], x[2 * i + 1]
            rotated += [even * cos[i] - odd * sin[i], even * sin[i] + odd * cos[i]]
        return self._rounded(rotated)
