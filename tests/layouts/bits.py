"""Inputs that reach every corner of the codecs, and how results are compared but for NaN."""

import dataclasses

import jax
import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn

from jmla.layouts import BlockScaleRows, FP4Rows, FP8Rows, Rows, V4Rows


def all_bf16(width: int, *, seed: int | None = None) -> np.ndarray:
    """Every bit pattern, in order or shuffled, in rows: blocks of like or of unlike numbers."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    if seed is not None:
        np.random.default_rng(seed).shuffle(bits)
    rows = -(-bits.size // width)
    return np.resize(bits, (rows, width)).view(bfloat16)


def all_exponents(width: int, *, seed: int) -> np.ndarray:
    """Blocks of every exponent, finite, with values at, below and above the middle of two codes."""
    rng = np.random.default_rng(seed)
    top = np.repeat(np.arange(255, dtype=np.int64), 2)[:, None]
    exponents = np.clip(top - rng.geometric(0.3, (top.size, width)) + 1, 0, 254)
    mantissas = rng.choice([0, 1, 16, 31, 32, 48, 63, 64, 65, 96, 112, 127], (top.size, width))
    signs = rng.integers(0, 2, (top.size, width))
    return (signs << 15 | exponents << 7 | mantissas).astype(np.uint16).view(bfloat16)


def hostile_blocks(width: int, *, seed: int) -> np.ndarray:
    """Rows of zeros of both signs, with a few NaN, infinities, subnormal and ordinary numbers."""
    rng = np.random.default_rng(seed)
    rare = np.array([0x7FC0, 0xFFC1, 0x7F80, 0xFF80, 0x0001, 0x8001, 0x7F7F, 0x3F80, 0xBDCD])
    rows = 96
    bits = rng.choice([0, 0x8000], (rows, width))
    odds = np.linspace(0, 0.2, rows)[:, None]
    bits = np.where(rng.random((rows, width)) < odds, rng.choice(rare, (rows, width)), bits)
    return bits.astype(np.uint16).view(bfloat16)


def every_kind(width: int) -> np.ndarray:
    """All of the above."""
    return np.concatenate(
        [
            all_bf16(width),
            all_bf16(width, seed=1),
            all_exponents(width, seed=2),
            hostile_blocks(width, seed=3),
        ]
    )


def without_subnormal(values: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign: XLA on the CPU may divide and multiply them so."""
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float32)
        subnormal = np.abs(wide) < np.finfo(np.float32).tiny
        return np.where(subnormal, np.copysign(np.float32(0), wide), wide).astype(values.dtype)


def without_nan(values: np.ndarray) -> np.ndarray:
    """NaN as ones, for bytes that do not say of what type they are."""
    nan = np.isnan(values.astype(np.float32))
    return np.where(nan, np.ones_like(values), values)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def exactly_dequantised(rows: Rows) -> np.ndarray:
    """By numpy: products in f32, rounded once to bf16, nothing flushed."""
    match rows:
        case FP4Rows():
            packed = np.asarray(rows.packed)
            codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
            values = np.where(codes & 8, -_E2M1[codes & 7], _E2M1[codes & 7])
            return _scaled(values, _powers(rows.exponents))
        case V4Rows():
            nope = _scaled(np.asarray(rows.nope), _powers(rows.exponents))
            return np.concatenate([nope, np.asarray(rows.rope)], axis=-1)
        case BlockScaleRows():
            nope = _scaled(np.asarray(rows.nope), np.asarray(rows.scales))
            return np.concatenate([nope, np.asarray(rows.rope)], axis=-1)
        case FP8Rows():
            scale = np.float32(1) if rows.scale is None else np.asarray(rows.scale)
            return _scaled(np.asarray(rows.values), np.broadcast_to(scale, (*rows.shape, 1)))
    return np.asarray(rows.dequantize())


def _powers(exponents: object) -> np.ndarray:
    byte = np.asarray(exponents).astype(np.int32)
    return np.where(byte == 255, np.nan, np.ldexp(np.float64(1), byte - 127)).astype(np.float32)


def _scaled(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    blocks = codes.astype(np.float32).reshape(*scales.shape, -1)
    with np.errstate(all="ignore"):
        return (blocks * scales[..., None]).reshape(codes.shape).astype(bfloat16)


def canonical(leaf: object) -> np.ndarray:
    """The bytes of a leaf, with one NaN of each type."""
    array = np.atleast_1d(np.asarray(leaf))
    if array.dtype in (bfloat16, float8_e4m3fn, np.float32):
        array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
    return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape[:-1], -1)


def assert_same_but_nan(ours: object, theirs: object) -> None:
    """The same format and bytes; NaN may have another sign and payload, and FP4's other codes."""
    if isinstance(ours, FP4Rows) and isinstance(theirs, FP4Rows):
        ours, theirs = _without_codes_of_nan(ours), _without_codes_of_nan(theirs)
    our_format: object = jax.tree.structure(ours)
    assert our_format == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for number, (a, b) in enumerate(pairs):
        x, y = canonical(a), canonical(b)
        assert x.shape == y.shape, f"leaf {number}: {x.shape=} {y.shape=}"
        bad = np.argwhere(x != y)
        assert not bad.size, (
            f"leaf {number}: {len(bad)} of {x.size} bytes differ, first at {bad[:4].tolist()}: "
            f"{x[tuple(bad[0])]} and {y[tuple(bad[0])]}"
        )


def _without_codes_of_nan(rows: FP4Rows) -> FP4Rows:
    nan = np.repeat(np.asarray(rows.exponents) == 255, 8, axis=-1)
    return dataclasses.replace(rows, packed=np.where(nan, 0, np.asarray(rows.packed)))  # type: ignore[arg-type]


def on_cpu(tree: object) -> object:
    """The tree on the host's own device, where XLA's results are the reference."""
    return jax.device_put(tree, jax.devices("cpu")[0])
