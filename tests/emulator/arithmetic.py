"""Instructions from registers to registers of the same thread."""

import operator
import re
from typing import Any

import ml_dtypes
import numpy as np

from tests.emulator.ptx import instruction

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = {"f16": F16, "bf16": BF16}
_NAN = 0x7FFFFFFF  # the only one that arithmetic makes
_SMALLEST_NORMAL = np.float32(2.0**-126)


def pairs(bits: np.ndarray, kind: Any) -> np.ndarray:
    """Words as [128, 2] of a type of 16 bits."""
    return np.ascontiguousarray(bits).view(kind).reshape(-1, 2)


def words(halves: np.ndarray) -> np.ndarray:
    """The reverse of `pairs`."""
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)


def _float(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False).view(np.uint32)


@instruction(r"mov\.b(32|64)")
def move(match: re.Match, source: Any) -> Any:
    return words(np.stack(source, axis=1)) if isinstance(source, list) else source


@instruction(r"mov\.b32\.split")
def split(match: re.Match, source: np.ndarray) -> list[np.ndarray]:
    return list(pairs(source, np.uint16).T)


@instruction(r"(mul|fma)\.rn\.(f16|bf16)x2")
def multiply(match: re.Match, a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
    kind = FLOATS[match[2]]
    product = pairs(a, kind).astype(np.float64) * pairs(b, kind).astype(np.float64)
    for each in c:
        product = product + pairs(each, kind).astype(np.float64)
    # The product is exact in f32, and ml_dtypes rounds f64 to bf16 by way of it.
    return words(product.astype(kind))


@instruction(r"cvt\.rn\.(f16|bf16)x2\.f32")
def pack(match: re.Match, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return words(np.stack([_float(lower), _float(upper)], axis=1).astype(FLOATS[match[1]]))


@instruction(r"cvt\.rz\.f16x2\.f32")
def truncate(match: re.Match, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    exact = np.stack([_float(lower), _float(upper)], axis=1)
    nearest = exact.astype(F16)
    beyond = np.abs(nearest.astype(np.float32)) > np.abs(exact)
    return words(np.where(beyond, np.nextafter(nearest, F16.type(0)), nearest))


@instruction(r"cvt\.rn\.satfinite\.e4m3x2\.f32")
def encode_codes(match: re.Match, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    values = np.clip(np.stack([_float(lower), _float(upper)], axis=1), -448, 448)
    codes = values.astype(E4M3).view(np.uint8)
    codes = np.where(np.isnan(values), 0x7F, codes).astype(np.uint8)
    return codes.view(np.uint16).reshape(-1)


@instruction(r"cvt\.rn\.f16x2\.e4m3x2")
def widen_codes(match: re.Match, codes: np.ndarray) -> np.ndarray:
    return words(np.ascontiguousarray(codes).view(E4M3).reshape(-1, 2).astype(F16))


@instruction(r"cvt\.rn\.f16\.f32")
def narrow(match: re.Match, value: np.ndarray) -> np.ndarray:
    return _float(value).astype(F16).view(np.uint16)


@instruction(r"cvt\.f32\.f16")
def widen(match: re.Match, value: np.ndarray) -> np.ndarray:
    return _bits(np.ascontiguousarray(value).view(F16).astype(np.float32))


@instruction(r"(max|min|add)\.(s|u)16x2")
def integer_pairs(match: re.Match, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    kind = np.int16 if match[2] == "s" else np.uint16
    function = {"max": np.maximum, "min": np.minimum, "add": np.add}[match[1]]
    return words(function(pairs(a, kind), pairs(b, kind)))


@instruction(r"prmt\.b32")
def permute(match: re.Match, a: np.ndarray, b: np.ndarray, selector: Any) -> np.ndarray:
    both = np.stack([a, b], axis=1).view(np.uint8).reshape(-1, 8)
    nibbles = (
        np.broadcast_to(selector, a.shape).astype(np.int64)[:, None] >> (4 * np.arange(4))
    ) & 15
    chosen = np.take_along_axis(both, nibbles & 7, axis=1)
    signs = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
    return words(np.where(nibbles & 8, signs, chosen))


@instruction(r"lop3\.b32")
def logic(match: re.Match, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    result = np.zeros_like(a)
    for case in range(8):
        if table >> case & 1:
            result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return result


@instruction(r"popc\.b32")
def count_bits(match: re.Match, a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a).astype(np.uint32)


@instruction(r"clz\.b32")
def leading_zeros(match: re.Match, a: np.ndarray) -> np.ndarray:
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


@instruction(r"brev\.b32")
def reverse(match: re.Match, a: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4), axis=1)
    return words(np.packbits(bits.reshape(-1, 32)[:, ::-1], axis=1)[:, ::1])


@instruction(r"max\.u32")
def maximum_unsigned(match: re.Match, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a, b)


@instruction(r"cvt\.rzi\.s32\.f32")
def to_integer(match: re.Match, a: np.ndarray) -> np.ndarray:
    return _float(a).astype(np.int32).view(np.uint32)


@instruction(r"sqrt\.(approx|rn)\.f32")
def square_root(match: re.Match, a: np.ndarray) -> np.ndarray:
    return _bits(np.sqrt(_float(a)))


@instruction(r"add\.rn\.f32")
def add(match: re.Match, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    result = _bits(_float(a) + _float(b))
    return np.where(np.isnan(_float(result)), np.uint32(_NAN), result)


@instruction(r"abs\.f32")
def magnitude(match: re.Match, a: np.ndarray) -> np.ndarray:
    return a & np.uint32(0x7FFFFFFF)


@instruction(r"fma\.rn\.f32")
def fma(match: re.Match, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return _bits(_float(a).astype(np.float64) * _float(b) + _float(c))


@instruction(r"max(\.NaN)?\.f32")
def maximum(match: re.Match, a: np.ndarray, b: Any) -> np.ndarray:
    other = np.broadcast_to(np.uint32(b) if isinstance(b, int) else b, a.shape)
    return _bits((np.maximum if match[1] else np.fmax)(_float(a), _float(other)))


@instruction(r"min\.NaN\.xorsign\.abs\.f32")
def smaller_magnitude(match: re.Match, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    magnitude = np.minimum(np.abs(_float(a)), np.abs(_float(b)))  # NaN if one is
    return _bits(magnitude) | ((a ^ b) & np.uint32(1 << 31))


@instruction(r"div\.rn\.f32")
def divide(match: re.Match, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _bits(_float(a) / _float(b))


@instruction(r"ex2\.approx\.ftz\.f32")
def exp2(match: re.Match, a: np.ndarray) -> np.ndarray:
    result = np.exp2(_float(a))
    return _bits(np.where(np.abs(result) < _SMALLEST_NORMAL, np.float32(0), result))


@instruction(r"lg2\.approx\.f32")
def log2(match: re.Match, a: np.ndarray) -> np.ndarray:
    return _bits(np.log2(_float(a)))


@instruction(r"setp\.(ne|eq)\.u32")
def compare(match: re.Match, a: np.ndarray, b: Any) -> np.ndarray:
    return (operator.ne if match[1] == "ne" else operator.eq)(a, b)


@instruction(r"selp\.u32")
def choose(match: re.Match, a: int, b: int, condition: Any) -> np.ndarray:
    return np.where(condition, np.uint32(a), np.uint32(b))
