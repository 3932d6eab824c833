"""Grouped-query decode in f64 over exactly dequantised keys and values, and caches to try it on."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmla.layouts import KeyValueRows, quantize_key_values
from tests.attention.exact import Paging, random_paging, relative_error
from tests.helpers import assert_close

FORMATS: dict[str, tuple[str, dict[str, float]]] = {
    "bf16": ("bfloat16", {}),
    "fp8": ("fp8_e4m3", {}),
    "scaled fp8": ("fp8_e4m3", {"key_scale": 0.03, "value_scale": 0.017}),
    "fp4": ("fp4_e2m1", {}),
}
LENGTHS = [0, 1, 2, 63, 64, 65, 130, 300]
OUT_ERROR = 4.5e-3  # a weight's rounding adds to the output's, and in few rows they may agree
Results = tuple[Any, Any]


class Sizes(NamedTuple):
    """Of a call.

    Attributes:
        kv_heads: of the cache.
        group: query heads for each.
        head_dim: values of a head.
        s_q: tokens of a request.
        page_size: of the cache.
    """

    kv_heads: int = 2
    group: int = 3
    head_dim: int = 128
    s_q: int = 1
    page_size: int = 16


def random_key_values(seed: int, name: str, shape: Sequence[int], sizes: Sizes) -> KeyValueRows:
    """Random keys and values of a format, whose blocks differ by some powers of two."""
    rng = np.random.default_rng(seed)
    full = (*shape, sizes.kv_heads, sizes.head_dim)
    keys, values = rng.normal(size=(2, *full))
    powers = 2.0 ** rng.integers(-2, 3, (*full[:-1], sizes.head_dim // 16))
    values = values * np.repeat(powers, 16, axis=-1)
    dtype, scales = FORMATS[name]
    return _quantize(
        jnp.asarray(keys, jnp.bfloat16), jnp.asarray(values, jnp.bfloat16), dtype, **scales
    )


# One by one, the operations of a codec take seconds to compile.
_quantize = jax.jit(quantize_key_values, static_argnums=2)
dequantize = jax.jit(lambda rows: rows.dequantize())


def poison(rows: KeyValueRows, slots: np.ndarray) -> KeyValueRows:
    """NaN at every slot that is not one of these."""
    keep = np.zeros(rows.num_slots, bool)
    keep[slots[slots >= 0]] = True
    leaves: dict[str, Any] = {}
    for name in rows.token_leaves:
        leaf = np.array(getattr(rows.flat(), name))
        leaf[~keep] = 255 if leaf.dtype == np.uint8 else np.nan
        leaves[name] = jnp.asarray(leaf.reshape(getattr(rows, name).shape))
    return dataclasses.replace(rows, **leaves)


def exact_key_values(rows: KeyValueRows) -> tuple[np.ndarray, np.ndarray]:
    """f64 [slots, kv_heads, head_dim]: codes times scales, not rounded."""
    flat = rows.flat()
    if rows.kv_cache_dtype != "fp8_e4m3":  # powers of two: exact in bf16
        keys, values = dequantize(flat)
        return np.asarray(keys).astype(np.float64), np.asarray(values).astype(np.float64)
    scaled = []
    for name in ("key", "value"):
        scale = getattr(flat, f"{name}_scale")
        codes = np.asarray(getattr(flat, f"{name}s")).astype(np.float64)
        scaled.append(codes * (1.0 if scale is None else float(scale)))
    return scaled[0], scaled[1]


def exact_gqa(
    q: Any, rows: KeyValueRows, slots: np.ndarray, seq_lens: Any, *, sm_scale: float, causal: bool
) -> Results:
    """out [b, s_q, h, dim] and lse [b, s_q, h] in f64; `slots` as in `Paging`."""
    q = np.asarray(q).astype(np.float64)
    b, s_q, heads, _ = q.shape
    group = heads // rows.kv_heads
    stored = exact_key_values(rows)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for i, j in np.ndindex(b, s_q):
        length = max(int(seq_lens[i]), 0) - (s_q - 1 - j if causal else 0)
        own = slots[i, : max(length, 0)]
        keys, values = (x[own[own >= 0]] for x in stored)
        if not len(keys):
            continue
        for head in range(heads):
            logits = keys[:, head // group] @ q[i, j, head] * float(np.float32(sm_scale))
            weights = np.exp(logits - logits.max())
            out[i, j, head] = weights @ values[:, head // group] / weights.sum()
            lse[i, j, head] = logits.max() + np.log(weights.sum())
    return out, lse


def random_queries(seed: int, b: int, sizes: Sizes) -> jax.Array:
    shape = (b, sizes.s_q, sizes.kv_heads * sizes.group, sizes.head_dim)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def case(name: str, seq_lens: Sequence[int], sizes: Sizes) -> tuple[jax.Array, Any, Paging]:
    """Queries, a cache with NaN where no request has a position, and the pages."""
    paging = random_paging(sizes.page_size, sizes.page_size, seq_lens)
    rows = random_key_values(1, name, (paging.pages, sizes.page_size), sizes)
    return random_queries(0, len(seq_lens), sizes), poison(rows, paging.slots), paging


def check(
    decode: Callable[..., Results],
    name: str,
    seq_lens: Sequence[int],
    sizes: Sizes,
    *,
    causal: bool = True,
    rounded: bool = False,
    **options: Any,
) -> None:
    """`decode(q, rows, table, seq_lens, sm_scale=, causal=, **options)` against f64.

    `rounded` is for code that rounds dequantised keys and values to bf16, which shows where the
    scale of FP8 is no power of two.
    """
    q, rows, paging = case(name, seq_lens, sizes)
    scale = sizes.head_dim**-0.5
    lengths = jnp.asarray(seq_lens, jnp.int32)
    table = jnp.asarray(paging.table, jnp.int32)
    ours = decode(q, rows, table, lengths, sm_scale=scale, causal=causal, **options)
    exact = exact_gqa(q, rows, paging.slots, seq_lens, sm_scale=scale, causal=causal)
    rounds = rounded and name == "scaled fp8"
    # A weight's rounding, 2^-9, shows beside small values where one of the largest is attended to.
    largest = float(
        np.abs(exact_key_values(rows)[1][paging.slots[paging.slots >= 0]]).max(initial=1)
    )
    assert_close(
        ours[0],
        exact[0],
        abs_tol=(8e-3 if rounds else 2.5e-3) * largest,
        rel_tol=2.01 / 128,
        cos_tol=2e-5,
    )
    assert_close(ours[1], exact[1], abs_tol=2e-2 if rounds else 1e-5, rel_tol=8.01 / 65536)
    assert relative_error(np.asarray(ours[0]).astype(np.float64), exact[0]) <= (
        6e-3 if rounds else OUT_ERROR
    )
