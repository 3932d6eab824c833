"""Values of all threads of a warpgroup, in place of those of MLIR, and their types."""

import dataclasses
from typing import Self

import numpy as np

LANES = 128
WARP = 32
_WORDS = {1: np.dtype(np.bool_), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
_FLOAT = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class IntegerType:
    """A word of 1, 32 or 64 bits."""

    width: int

    @classmethod
    def get_signless(cls, width: int) -> Self:
        return cls(width)

    @property
    def dtype(self) -> np.dtype:
        return _WORDS[self.width]


@dataclasses.dataclass(frozen=True)
class F32Type:
    """A float."""

    @classmethod
    def get(cls) -> Self:
        return cls()

    @property
    def dtype(self) -> np.dtype:
        return _FLOAT


Type = IntegerType | F32Type
_ALL: tuple[Type, ...] = (*(IntegerType(width) for width in (1, 32, 64)), F32Type())
_TYPES = {each.dtype.char: each for each in _ALL}


class Lanes:
    """One value of each thread; never written after it was made."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def type(self) -> Type:
        return _TYPES[self.array.dtype.char]

    @property
    def bits(self) -> np.ndarray:
        array = self.array
        return array.view(np.uint32) if array.dtype.char == "f" else array

    @classmethod
    def of_bits(cls, bits: np.ndarray, kind: Type) -> "Lanes":
        """From the bits that an instruction has left in a register."""
        if bits.shape != (LANES,) or bits.dtype.itemsize != kind.dtype.itemsize:
            raise TypeError(f"{bits.shape=} {bits.dtype=} in a register: expected {kind=}")
        return Lanes(bits.view(kind.dtype))
