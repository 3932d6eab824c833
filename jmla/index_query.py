"""The query side of the lightning indexer: rotated, quantised to e4m3, scales in the head weights.

A Hadamard rotation of queries and keys, which is orthogonal, leaves their products as they are and
spreads large values before they are quantised. Whether a cache has keys that were rotated so is a
static field of its keys (`IndexKeyRows.hadamard`): queries must be of the same kind.

`implementation`:

- `"xla"` runs everywhere.
- `"mosaic_gpu"` is one kernel for Hopper (compute capability 9.0) for heads of 64 or 128 values of
  which 16, 32, 64 or 128 are rotated by position. Its sums, products and roundings are those of
  `"xla"`, one by one; where XLA fuses a product with the sum behind it, a rotated value may differ
  in its last bit. A call that it does not serve raises NotImplementedError with every reason.
- None is `"mosaic_gpu"` where JAX's default device is a GPU of compute capability 9.0 and the
  kernel serves the call, and `"xla"` otherwise.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jmla import _implementation, _mosaic_query
from jmla.layouts.base import check_scale_format
from jmla.layouts.index_keys import quantize_index_keys
from jmla.rope import rotate

_OTHERS = ("xla",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawIndexQueries:
    """Index queries as a projection gives them, with what prepares them.

    Attributes:
        values: bf16 or f32 `[tokens, heads, dim]`.
        weights: `[tokens, heads]`, with every constant factor of the model already in.
        cos: f32 `[tokens, pairs]`, of the rotary pairs at the front of each head.
        sin: likewise.
        interleaved: whether pairs are neighbours; else half of the rotary values apart. Static.
    """

    values: Float[Array, "t heads dim"]
    weights: Float[Array, "t heads"]
    cos: Float32[Array, "t pairs"]
    sin: Float32[Array, "t pairs"]
    interleaved: bool = dataclasses.field(kw_only=True, metadata={"static": True})

    def rotated(self) -> Float[Array, "t heads dim"]:
        """The values, rotated by position, in their dtype."""
        front, back = jnp.split(self.values, [2 * self.cos.shape[-1]], axis=-1)
        front = rotate(front, self.cos, self.sin, interleaved=self.interleaved)
        return jnp.concatenate([front, back], axis=-1)


def quantize_index_query(
    q: Float[Array, "*t heads dim"],
    weights: Float[Array, "*t heads"],
    *,
    scale_format: Literal["pow2", "fp32"] = "pow2",
) -> tuple[Float[Array, "*t heads dim"], Float[Array, "*t heads"]]:
    """Index queries in fp8, their scales moved into the head weights.

    Each head of each token is quantised by the rule of the index keys (`quantize_index_keys`): a
    relu commutes with a positive scale, so the weight can carry it.

    Args:
        q: bf16 or f32 `[..., heads, dim]`.
        weights: `[..., heads]`, with every constant factor of the model already in.
        scale_format: `"pow2"` (what published checkpoints were trained with) or `"fp32"`.

    Returns:
        `(q, weights)`: e4m3 `[..., heads, dim]` and f32 `[..., heads]`.

    Raises:
        ValueError: `weights` has not the shape of `q` without its last axis.
    """
    if q.shape[:-1] != weights.shape:
        raise ValueError(
            f"{q.shape=}, {weights.shape=}: expected [..., heads, dim] and [..., heads]"
        )
    rows = quantize_index_keys(q, scale_format=scale_format)
    return rows.keys, weights.astype(jnp.float32) * rows.scales


def hadamard_rotation(x: Float[Array, "*n dim"]) -> Float[Array, "*n dim"]:
    """The last axis times a Hadamard matrix in Sylvester's order, over sqrt(dim).

    Sums and differences are f32, of neighbours first, then of pairs of these and so on; the result
    has the dtype of `x`. Twice is the identity, but for roundings.

    Args:
        x: bf16 or f32 `[..., dim]`, `dim` a power of two.

    Raises:
        ValueError: another `dim`.
    """
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"{x.shape=}: expected a power of two as the last axis")
    wide, distance = x.astype(jnp.float32), 1
    while distance < dim:
        pairs = wide.reshape(*x.shape[:-1], dim // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        wide = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        distance *= 2
    return (wide * jnp.float32(dim**-0.5)).astype(x.dtype)


def prepare_index_query(
    raw: RawIndexQueries,
    *,
    hadamard: bool = False,
    scale_format: Literal["pow2", "fp32"] = "pow2",
    implementation: str | None = None,
) -> tuple[Float[Array, "t heads dim"], Float[Array, "t heads"]]:
    """Index queries rotated by position and, if asked for, by Hadamard, then quantised.

    Between the steps values are rounded to the dtype they came in, as by `jmla.apply_rope`,
    `jmla.hadamard_rotation` and `quantize_index_query` one after the other.

    Args:
        raw: the queries.
        hadamard: whether keys are rotated so: `IndexKeyRows.hadamard`.
        scale_format: as of `quantize_index_query`.
        implementation: see the module.

    Returns:
        `(q, weights)`: e4m3 `[t, heads, dim]` and f32 `[t, heads]`, the queries' scales included.

    Raises:
        ValueError: shapes that do not fit each other.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    check_scale_format(scale_format)
    q = raw.values
    if q.ndim != 3 or raw.weights.shape != q.shape[:2]:
        raise ValueError(
            f"{q.shape=}, {raw.weights.shape=}: expected [t, heads, dim] and [t, heads]"
        )
    pairs = raw.cos.shape[-1]
    if raw.cos.shape != (len(q), pairs) or raw.sin.shape != raw.cos.shape or 2 * pairs > q.shape[2]:
        raise ValueError(
            f"{raw.cos.shape=}, {raw.sin.shape=}: expected [t, pairs], at most half of {q.shape=}"
        )
    rotation = _mosaic_query.Rotation(raw.cos, raw.sin) if pairs else None
    reasons = _mosaic_query.unsupported_reasons(q, rotation)
    if _implementation.choose(implementation, reasons, _OTHERS) == "mosaic_gpu":
        format_ = _mosaic_query.Format(raw.interleaved, hadamard, scale_format)
        return _mosaic_query.prepare(q, raw.weights, rotation, format_)
    rotated = raw.rotated()
    if hadamard:
        rotated = hadamard_rotation(rotated)
    return quantize_index_query(rotated, raw.weights, scale_format=scale_format)
