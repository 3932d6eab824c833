"""The `arith` dialect over lanes; the same names, so that this module takes its place."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxlib.mlir.dialects.arith import CmpFPredicate, CmpIPredicate

from tests.emulator.lanes import LANES, F32Type, Lanes, Type
from tests.emulator.warpgroup import current

_SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}
# Apart, because the enumerations are numbers, and equal to each other's.
_SIGNED_COMPARISONS: dict[Any, Callable[[Any, Any], Any]] = {
    CmpIPredicate.slt: operator.lt,
    CmpIPredicate.sge: operator.ge,
    CmpIPredicate.sgt: operator.gt,
}
_UNSIGNED_COMPARISONS = {
    CmpIPredicate.ult: operator.lt,
    CmpIPredicate.uge: operator.ge,
    CmpIPredicate.eq: operator.eq,
}
_FLOAT_COMPARISONS = {
    CmpFPredicate.OLT: operator.lt,
    CmpFPredicate.OGE: operator.ge,
    CmpFPredicate.OGT: operator.gt,
    CmpFPredicate.OEQ: operator.eq,
}

__all__ = ["CmpFPredicate", "CmpIPredicate"]


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Lanes, Lanes], Lanes]:
    def emit(a: Lanes, b: Lanes) -> Lanes:
        x, y = a.array, b.array
        if x.dtype != y.dtype:
            raise TypeError(f"{x.dtype=} {y.dtype=}: expected operands of one type")
        return Lanes(function(x, y))

    return emit


def _shift(function: Callable[[Any, Any], Any]) -> Callable[[Lanes, Lanes], Lanes]:
    def checked(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        width = 8 * x.dtype.itemsize
        if (y >= width).any() and (y[current().mask] >= width).any():
            raise ValueError(f"{y.max()=}: expected shifts by less than {width=}")
        return function(x, y)

    return _binary(checked)


def _signed(array: np.ndarray) -> np.ndarray:
    return array.view(_SIGNED[array.dtype])


addi = addf = _binary(operator.add)
subi = subf = _binary(operator.sub)
muli = mulf = _binary(operator.mul)
andi = _binary(operator.and_)
ori = _binary(operator.or_)
xori = _binary(operator.xor)
divui = _binary(operator.floordiv)
remui = _binary(operator.mod)
shli = _shift(operator.lshift)
shrui = _shift(operator.rshift)
shrsi = _shift(lambda x, y: (_signed(x) >> _signed(y)).view(x.dtype))
maxsi = _binary(lambda x, y: np.maximum(_signed(x), _signed(y)).view(x.dtype))
minsi = _binary(lambda x, y: np.minimum(_signed(x), _signed(y)).view(x.dtype))


def constant(kind: Type, value: float) -> Lanes:
    if isinstance(kind, F32Type):
        return Lanes(np.full(LANES, value, np.float32))
    if not -(1 << (kind.width - 1)) <= value < 1 << kind.width:
        raise ValueError(f"{value=}: expected {kind.width} bits")
    return Lanes(np.full(LANES, int(value) % (1 << kind.width), kind.dtype))


def cmpi(predicate: Any, a: Lanes, b: Lanes) -> Lanes:
    if predicate in _UNSIGNED_COMPARISONS:
        return _binary(_UNSIGNED_COMPARISONS[predicate])(a, b)
    return _binary(lambda x, y: _SIGNED_COMPARISONS[predicate](_signed(x), _signed(y)))(a, b)


def cmpf(predicate: Any, a: Lanes, b: Lanes) -> Lanes:
    return _binary(_FLOAT_COMPARISONS[predicate])(a, b)


def select(condition: Lanes, a: Lanes, b: Lanes) -> Lanes:
    return _binary(lambda x, y: np.where(condition.array, x, y))(a, b)


def extui(kind: Type, a: Lanes) -> Lanes:
    return Lanes(a.array.astype(kind.dtype))


def bitcast(kind: Type, a: Lanes) -> Lanes:
    return Lanes(a.array.view(kind.dtype))


def sitofp(kind: Type, a: Lanes) -> Lanes:
    return Lanes(_signed(a.array).astype(kind.dtype))
