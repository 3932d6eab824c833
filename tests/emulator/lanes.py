"""Values of all threads of a warpgroup, in place of those of MLIR, and their types."""

import dataclasses
from typing import Any, Self

import numpy as np

LANES = 128
WARP = 32


@dataclasses.dataclass(frozen=True)
class IntegerType:
    """A word of 1, 32 or 64 bits."""

    width: int

    @classmethod
    def get_signless(cls, width: int) -> Self:
        return cls(width)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({1: np.bool_, 32: np.uint32, 64: np.uint64}[self.width])


@dataclasses.dataclass(frozen=True)
class F32Type:
    """A float."""

    @classmethod
    def get(cls) -> Self:
        return cls()

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)


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
    def of_bits(cls, bits: Any, kind: Type) -> "Lanes":
        """From the bits that an instruction has left in a register."""
        array = np.asarray(bits)
        if array.dtype.itemsize != kind.dtype.itemsize:
            raise TypeError(f"{array.dtype=} in a register: expected {kind=}")
        return Lanes(np.broadcast_to(array, (LANES,)).view(kind.dtype))
