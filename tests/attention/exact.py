"""Sparse decode in f64 over exactly dequantised rows: what kernels that round late are held to."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmla.layouts import (
    BF16Rows,
    BlockScaleRows,
    FP4Rows,
    FP8Rows,
    KVLayout,
    PackedBlockScaleRows,
    PagedV4Rows,
    Rows,
    V4Rows,
    from_bytes,
    quantize,
    to_bytes,
)
from jmla.layouts.base import BLOCK_SCALE_TILE
from tests.attention.cases import INT_MAX, INT_MIN, random_rows
from tests.helpers import assert_close

Format = tuple[KVLayout, dict[str, Any]]
Cache = tuple[Rows, Any, Any]

BF16: Format = (KVLayout.BF16, {})
FP8: Format = (KVLayout.FP8_NOPE_FP8_ROPE, {})
SCALED_FP8: Format = (KVLayout.FP8_NOPE_FP8_ROPE, {"scale": 0.0173})
POW2: Format = (KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, {"scale_format": "pow2"})
FP32: Format = (KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, {"scale_format": "fp32"})
FORMATS = (POW2, FP32, SCALED_FP8, BF16)
FP4: Format = (KVLayout.FP4, {})
V4: Format = (KVLayout.FP8_V4, {})
PAGED_V4: Format = (KVLayout.FP8_V4, {"in_place": True})
PACKED_POW2: Format = (POW2[0], POW2[1] | {"in_place": True})
PACKED_FP32: Format = (FP32[0], FP32[1] | {"in_place": True})


def rows_of(form: Format, seed: int, *shape: int, factors: np.ndarray | None = None) -> Rows:
    """Random rows of a format's usual sizes, each multiplied by its factor [slots, width].

    Rows that stay in pages take the last axis as a page.
    """
    layout, options = form
    options = dict(options)
    in_place = options.pop("in_place", False)
    rank = layout.default_rank
    latents = random_rows(seed, *shape, rank=rank).latents
    if factors is not None:
        scaled = np.asarray(latents, np.float32) * factors.reshape(latents.shape)
        latents = jnp.asarray(scaled.astype(jnp.bfloat16))
    if "scale" in options:
        options = {"scale": jnp.float32(options["scale"])}
    rows = quantize(latents, layout, rank=rank, rope_dim=64, **options)
    if not in_place:
        return rows
    if layout is KVLayout.FP8_V4:
        options["page_size"] = shape[-1]
    return from_bytes(to_bytes(rows), layout, in_place=True, **options)


def poison_all[R: Rows](rows: R, *named: jax.Array | np.ndarray) -> R:
    """`rows` with NaN in every array at every slot that none of the arrays of slots names."""
    keep = np.zeros(rows.num_slots, bool)
    for slots in named:
        flat = np.asarray(slots).ravel()
        keep[flat[(flat >= 0) & (flat < rows.num_slots)]] = True
    if isinstance(rows, PagedV4Rows):
        poisoned = poison_all(rows.unpacked(), np.nonzero(keep)[0])
        stride = rows.packed.shape[-1]
        return rows.unpack(poisoned.pack(page_bytes=stride), page_size=rows.page_size)
    leaves: dict[str, Any] = {}
    for name in rows.token_leaves:
        leaf = np.array(getattr(rows.flat(), name))
        leaf[~keep] = 255 if leaf.dtype == np.uint8 else np.nan  # NaN in bytes, too
        leaves[name] = jnp.asarray(leaf.reshape(getattr(rows, name).shape))
    return dataclasses.replace(rows, **leaves)


def exact_latents(rows: Rows) -> np.ndarray:
    """f64 [slots, width]: codes times scales, not rounded."""
    match rows.flat():
        case BF16Rows(latents=latents):
            return np.asarray(latents).astype(np.float64)
        case FP8Rows(values=values, scale=scale):
            return np.asarray(values).astype(np.float64) * (1.0 if scale is None else float(scale))
        case BlockScaleRows(nope=nope, scales=scales, rope=rope):
            wide = np.repeat(np.asarray(scales).astype(np.float64), BLOCK_SCALE_TILE, axis=-1)
            nope64 = np.asarray(nope).astype(np.float64) * wide
            return np.concatenate([nope64, np.asarray(rope).astype(np.float64)], axis=-1)
        case (FP4Rows() | V4Rows()) as few_bits:  # times powers of two, so exact in bf16
            return np.asarray(few_bits.dequantize()).astype(np.float64)
        case PagedV4Rows() as paged:
            return exact_latents(paged.unpacked())
        case PackedBlockScaleRows() as packed:
            return exact_latents(packed.unpacked())
    raise AssertionError(f"{rows.layout=} has no exact latents here")


def exact_decode(
    q: Any, caches: Sequence[Cache], *, sm_scale: float, attn_sink: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """out [b, s_q, h, 512] and lse [b, s_q, h] in f64.

    Args:
        q: bf16 [b, s_q, h, width].
        caches: rows, indices [b, s_q, topk] and topk_length (or None), for one or two caches.
        sm_scale: factor on the logits.
        attn_sink: f32 [h] or None.
    """
    q = np.asarray(q).astype(np.float64)
    out, lse = np.zeros((*q.shape[:3], 512)), np.full(q.shape[:3], -np.inf)
    stores = [exact_latents(rows) for rows, *_ in caches]
    for i, j in np.ndindex(q.shape[:2]):
        parts = []
        for store, (_, indices, lengths) in zip(stores, caches, strict=True):
            slots = np.asarray(indices)[i, j]
            if lengths is not None:
                wide = np.asarray(lengths).reshape(q.shape[0], -1)
                slots = slots[: max(0, wide[i, j % wide.shape[1]])]
            parts.append(store[slots[(slots >= 0) & (slots < len(store))]])
        keys = np.concatenate(parts)
        if len(keys):
            logits = q[i, j] @ keys.T * float(np.float32(sm_scale))
            top = logits.max(-1, keepdims=True)
            weights = np.exp(logits - top)
            total = weights.sum(-1, keepdims=True)
            out[i, j] = weights @ keys[:, :512] / total
            lse[i, j] = (top + np.log(total))[:, 0]
            if attn_sink is not None:
                with np.errstate(over="ignore"):
                    kept = 1 / (1 + np.exp(np.asarray(attn_sink).astype(np.float64) - lse[i, j]))
                out[i, j] *= kept[:, None]
    return out, lse


class Paging(NamedTuple):
    """Requests whose pages lie anywhere in a cache.

    Attributes:
        table: int32 [b, max_pages]; what a request does not need is garbage.
        slots: int32 [b, longest], the slot of each position, -1 past the end.
        pages: of the cache; some belong to nobody.
    """

    table: np.ndarray
    slots: np.ndarray
    pages: int


def random_paging(seed: int, page_size: int, seq_lens: Sequence[int], spare: int = 2) -> Paging:
    """Pages in a random order, for requests of these lengths."""
    rng = np.random.default_rng(seed)
    counts = [-(-max(length, 0) // page_size) for length in seq_lens]
    free = rng.permutation(sum(counts) + 3).astype(np.int32)
    garbage = np.array([-1, INT_MIN, INT_MAX, len(free), 2147480000, -123456], np.int32)
    table = rng.choice(garbage, (len(seq_lens), max(counts) + spare))
    slots = np.full((len(seq_lens), max(max(seq_lens), 1)), -1, np.int32)
    for i, (count, length) in enumerate(zip(counts, seq_lens, strict=True)):
        table[i, :count], free = free[:count], free[count:]
        at = np.arange(max(length, 0))
        slots[i, : len(at)] = table[i, at // page_size] * page_size + at % page_size
    return Paging(table, slots, sum(counts) + 3)


def exact_dense(
    q: Any,
    rows: Rows,
    slots: np.ndarray,
    seq_lens: Any,
    *,
    sm_scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """out [b, s_q, h, 512] and lse [b, s_q, h] of dense decode in f64.

    Args:
        q: bf16 [b, s_q, h, width].
        rows: the cache.
        slots: of each position; see `Paging`.
        seq_lens: int32 [b].
        sm_scale: factor on the logits.
        causal: see `jmla.dense_decode`.
        window: likewise.
    """
    s_q = q.shape[1]
    behind = np.arange(s_q - 1, -1, -1) if causal else np.zeros(s_q, int)
    lengths = np.maximum(np.asarray(seq_lens, np.int64), 0)[:, None] - behind
    places = np.arange(slots.shape[1])
    seen = places < lengths[..., None]
    if window is not None:
        seen &= places >= lengths[..., None] - window
    return exact_decode(q, [(rows, np.where(seen, slots[:, None], -1), None)], sm_scale=sm_scale)


def exact_tops(q: Any, rows: Rows, indices: Any, lengths: Any, *, sm_scale: float) -> np.ndarray:
    """The largest logits [b, s_q, h] in f64; -inf for a token that attends to nothing.

    Args:
        q: bf16 [b, s_q, h, width].
        rows: the cache.
        indices: int32 [b, s_q, topk].
        lengths: int32 [b] or None.
        sm_scale: factor on the logits.
    """
    q, store = np.asarray(q).astype(np.float64), exact_latents(rows)
    tops = np.full(q.shape[:3], -np.inf)
    for i, j in np.ndindex(q.shape[:2]):
        slots = np.asarray(indices)[i, j]
        if lengths is not None:
            slots = slots[: max(0, int(lengths[i]))]
        slots = slots[(slots >= 0) & (slots < len(store))]
        if slots.size:
            tops[i, j] = (q[i, j] @ store[slots].T * float(np.float32(sm_scale))).max(-1)
    return tops


def exact_prefill(
    q: Any,
    rows: Rows,
    indices: Any,
    *,
    sm_scale: float,
    topk_length: Any = None,
    attn_sink: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out [t, h, 512], max_logits and lse [t, h] of sparse prefill in f64."""
    q, indices = np.asarray(q)[:, None], np.asarray(indices)[:, None]
    caches = [(rows, indices, topk_length)]
    out, lse = exact_decode(q, caches, sm_scale=sm_scale, attn_sink=attn_sink)
    tops = exact_tops(q, rows, indices, topk_length, sm_scale=sm_scale)
    return out[:, 0], tops[:, 0], lse[:, 0]


def assert_exact_prefill(
    ours: tuple[Any, Any, Any],
    exact: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    lse_abs: float = 1e-5,
    out_error: float = 2.7e-3,
) -> None:
    """`assert_exact` for prefill; the rounding of bf16 weights adds to that of the output."""
    assert_exact((ours[0], ours[2]), (exact[0], exact[2]), lse_abs=lse_abs, out_error=out_error)
    assert_close(ours[1], exact[1], abs_tol=lse_abs, rel_tol=8.01 / 65536)


def assert_exact(
    ours: tuple[Any, Any],
    exact: tuple[np.ndarray, np.ndarray],
    *,
    lse_abs: float = 1e-5,
    out_error: float = 2.3e-3,
) -> None:
    """FlashMLA's tolerances, and a relative error of all of out that leaves little but bf16's.

    Rounding an exact result to bf16 is an error of 1.66e-3. FlashMLA's absolute tolerance of lse,
    1e-6, is less than the rounding of an f32 sum where the lse of a single key is near zero.
    """
    out = np.asarray(ours[0]).astype(np.float64)
    assert_close(out, exact[0], abs_tol=1e-3, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(ours[1], exact[1], abs_tol=lse_abs, rel_tol=8.01 / 65536)
    assert relative_error(out, exact[0]) <= out_error


def relative_error(ours: np.ndarray, exact: np.ndarray) -> float:
    """The norm of the difference over that of `exact`; 0 if both are zero."""
    norm = float(np.linalg.norm(exact))
    difference = float(np.linalg.norm(np.asarray(ours, np.float64) - exact))
    return difference / norm if norm else difference
