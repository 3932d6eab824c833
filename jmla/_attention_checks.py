"""What the attention ops ask of their arguments: all of it decided by shapes and dtypes."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmla.layouts.base import Rows


def check_queries(q: Array, axes: tuple[str, ...], rows: Rows) -> None:
    """Raises ValueError unless `q` is bf16 [*axes, rows.width] with a head, and `rows` is sound."""
    if not isinstance(rows, Rows):
        raise ValueError(
            f"{type(rows)=}: expected cache rows; make them with jmla.quantize, jmla.from_bytes "
            "or jmla.init_cache (then pass cache.rows)"
        )
    rows.check()
    if q.ndim != len(axes) + 1 or q.shape[-1] != rows.width:
        raise ValueError(
            f"{q.shape=}: expected [{', '.join(axes)}, {rows.width}] for {type(rows).__name__} of "
            f"{rows.rank=} and {rows.rope_dim=}; a query is its latent part, then its rotary part"
        )
    if q.shape[-2] == 0:
        raise ValueError(f"{q.shape=}: expected at least one head")
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"{q.dtype=}: expected bfloat16; cast with q.astype(jnp.bfloat16)")


def check_paged(rows: Rows) -> None:
    """Raises ValueError unless `rows` has the token shape (pages, page_size)."""
    if len(rows.shape) != 2 or rows.shape[1] == 0:
        raise ValueError(
            f"{rows.shape=}: expected rows of token shape (pages, page_size); use "
            "rows.reshape(-1, page_size)"
        )


def check_indices(name: str, x: Array, batch: tuple[int, ...], axis: str) -> None:
    """Raises ValueError unless `x` is int32 [*batch, axis] with a last axis of at least 1."""
    if x.ndim != len(batch) + 1 or x.shape[:-1] != batch or x.shape[-1] == 0:
        raise ValueError(
            f"{name}.shape={x.shape}: expected [{', '.join(map(str, batch))}, {axis}] with {axis} "
            "of at least 1; the leading axes are those of q, and unused places hold -1"
        )
    _check_int32(name, x)


def check_lengths(name: str, x: Array | None, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises ValueError unless `x` is None or int32 of one of `shapes`."""
    if x is None:
        return
    if x.shape not in shapes:
        raise ValueError(
            f"{name}.shape={x.shape}: expected {' or '.join(map(str, shapes))}, the leading axes "
            "of q"
        )
    _check_int32(name, x)


def check_sink(attn_sink: Array | None, num_heads: int) -> None:
    """Raises ValueError unless `attn_sink` is None or f32 [num_heads]."""
    if attn_sink is None:
        return
    if attn_sink.shape != (num_heads,) or attn_sink.dtype != jnp.float32:
        raise ValueError(
            f"{attn_sink.shape=} {attn_sink.dtype=}: expected float32 ({num_heads},), one logit "
            "per head of q"
        )


def check_scale(sm_scale: float | Float[Array, ""]) -> None:
    """Raises ValueError unless `sm_scale` is a finite number or an f32 scalar."""
    if isinstance(sm_scale, jax.Array):
        if sm_scale.shape != () or sm_scale.dtype != jnp.float32:
            raise ValueError(
                f"{sm_scale.shape=} {sm_scale.dtype=}: expected a number or a float32 scalar"
            )
    elif not math.isfinite(sm_scale):
        raise ValueError(f"{sm_scale=}: expected a finite number, the model's softmax scale")


def check_splits(num_splits: int | None) -> None:
    """Raises ValueError unless `num_splits` is None or a positive int."""
    if num_splits is not None and (not isinstance(num_splits, int) or num_splits < 1):
        raise ValueError(f"{num_splits=}: expected a positive int, or None")


def check_window(window: int | None) -> None:
    """Raises ValueError unless `window` is None or a positive int."""
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{window=}: expected a positive int, or None")


def check_extra(
    rows: Rows, extra_rows: Rows | None, extra_indices: Array | None, extra_length: Array | None
) -> None:
    """Raises ValueError unless the second cache is absent, or whole and like the first."""
    if (extra_rows is None) != (extra_indices is None):
        given = "extra_indices" if extra_rows is None else "extra_rows"
        raise ValueError(
            f"only {given} is given: expected extra_rows and extra_indices, or neither"
        )
    if extra_rows is None:
        if extra_length is not None:
            raise ValueError(
                "extra_topk_length is given: expected extra_rows and extra_indices too"
            )
        return
    if not isinstance(extra_rows, Rows):
        raise ValueError(f"{type(extra_rows)=}: expected cache rows, as for the argument rows")
    extra_rows.check()
    ours, theirs = (rows.width, rows.value_dim), (extra_rows.width, extra_rows.value_dim)
    if ours != theirs:
        raise ValueError(
            f"extra_rows has (width, value_dim) {theirs}: expected {ours}, those of rows"
        )


def stack(name: str, parts: Array | Sequence[Array]) -> Array:
    """One array from a sequence of equal ones; ValueError if they differ or there is none."""
    if not isinstance(parts, jax.Array):
        kinds = {(part.shape, str(part.dtype)) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"{name} has {sorted(kinds)}: expected one shape and dtype")
        parts = jnp.stack(parts) if kinds else jnp.zeros(0)
    if parts.ndim == 0 or parts.shape[0] == 0:
        raise ValueError(f"{name} is empty: expected at least one result to merge")
    return parts


def _check_int32(name: str, x: Array) -> None:
    if x.dtype != jnp.int32:
        raise ValueError(f"{name}.dtype={x.dtype}: expected int32; cast with .astype(jnp.int32)")
