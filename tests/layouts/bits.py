"""Inputs that reach every corner of the codecs, and how results are compared but for NaN."""

import jax
import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn


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


def canonical(leaf: object) -> np.ndarray:
    """The bytes of a leaf, with one NaN of each type."""
    array = np.atleast_1d(np.asarray(leaf))
    if array.dtype in (bfloat16, float8_e4m3fn, np.float32):
        array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
    return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape[:-1], -1)


def assert_same_but_nan(ours: object, theirs: object) -> None:
    """The same format and bytes; NaN may have another sign and payload."""
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


def on_cpu(tree: object) -> object:
    """The tree on the host's own device, where XLA's results are the reference."""
    return jax.device_put(tree, jax.devices("cpu")[0])
