"""Keys and values of a cache with several heads, for grouped-query attention.

A token has a key and a value for each of `kv_heads` heads, of `head_dim` values. The leaves are the
buffers of other engines: of token shape (pages, page_size) they are the `k_cache` and `v_cache` of
FlashAttention's paged decode, and of token shape (slots,) the two pools of SGLang.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, UInt8

from jmla.layouts._scales import divide, to_bf16, to_e4m3
from jmla.layouts.base import FP4_BLOCK, TokenRows
from jmla.layouts.fp4 import decode_fp4, encode_fp4

KEY_VALUE_DTYPES = ("bfloat16", "fp8_e4m3", "fp4_e2m1")

KeysAndValues = tuple[
    BFloat16[Array, "*tokens kv_heads head_dim"], BFloat16[Array, "*tokens kv_heads head_dim"]
]


@dataclasses.dataclass(frozen=True)
class KeyValueRows(TokenRows):
    """Keys and values of `kv_heads` heads of `head_dim` values, stored in one of three ways."""

    kv_heads: int = dataclasses.field(kw_only=True, metadata={"static": True})
    head_dim: int = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    @abc.abstractmethod
    def kv_cache_dtype(self) -> str:
        """The serving engines' word for how they are stored."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values."""
        return sum(
            jnp.dtype(dtype).itemsize * math.prod(shape)
            for shape, dtype in self.token_leaves.values()
        )

    @abc.abstractmethod
    def encode(self, latents: Float[Array, "*tokens 2 kv_heads head_dim"]) -> Self:
        """Quantises keys and values, one after the other, to the format of these rows."""

    @abc.abstractmethod
    def dequantize(self) -> KeysAndValues:
        """The keys and the values: an f32 product, rounded once to bf16."""

    def _check_values(self, values: Array) -> None:
        expected = (2, self.kv_heads, self.head_dim)
        if values.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"{values.dtype=}: expected bfloat16 or float32; cast keys and values")
        if values.shape[-3:] != expected:
            raise ValueError(f"{values.shape=}: expected [..., {', '.join(map(str, expected))}]")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BF16KeyValues(KeyValueRows):
    """bf16 keys and values: 2048 bytes per token for 4 heads of 128.

    Attributes:
        keys: of each token and head.
        values: likewise.
    """

    keys: BFloat16[Array, "*tokens kv_heads head_dim"]
    values: BFloat16[Array, "*tokens kv_heads head_dim"]

    @property
    def kv_cache_dtype(self) -> str:
        """See `KeyValueRows.kv_cache_dtype`."""
        return "bfloat16"

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        row = ((self.kv_heads, self.head_dim), jnp.bfloat16)
        return {"keys": row, "values": row}

    def encode(self, latents: Float[Array, "*tokens 2 kv_heads head_dim"]) -> Self:
        """See `KeyValueRows.encode`."""
        self._check_values(latents)
        keys, values = _halves(to_bf16(latents))
        return dataclasses.replace(self, keys=keys, values=values)

    def dequantize(self) -> KeysAndValues:
        """See `KeyValueRows.dequantize`."""
        return self.keys, self.values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8KeyValues(KeyValueRows):
    """e4m3 keys and values: 1024 bytes per token for 4 heads of 128.

    A value beyond 448 times the scale, infinities included, saturates; NaN stays NaN.

    Attributes:
        keys: the codes of each token and head.
        values: likewise.
        key_scale: f32 scalar that multiplies each code of a key; None is exactly 1.
        value_scale: likewise, of a value.
    """

    keys: Float8e4m3fn[Array, "*tokens kv_heads head_dim"]
    values: Float8e4m3fn[Array, "*tokens kv_heads head_dim"]
    key_scale: Float32[Array, ""] | None = None
    value_scale: Float32[Array, ""] | None = None

    @property
    def kv_cache_dtype(self) -> str:
        """See `KeyValueRows.kv_cache_dtype`."""
        return "fp8_e4m3"

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        row = ((self.kv_heads, self.head_dim), jnp.float8_e4m3fn)
        return {"keys": row, "values": row}

    def check(self) -> None:
        """See `TokenRows.check`; the scales must be f32 scalars."""
        super().check()
        for name in ("key_scale", "value_scale"):
            scale = getattr(self, name)
            if scale is not None and (scale.shape, scale.dtype) != ((), jnp.float32):
                raise ValueError(
                    f"FP8KeyValues.{name}: {scale.shape=} {scale.dtype=}: expected an f32 scalar, "
                    "or None for exactly 1"
                )

    def encode(self, latents: Float[Array, "*tokens 2 kv_heads head_dim"]) -> Self:
        """See `KeyValueRows.encode`; the scales are those of these rows."""
        self._check_values(latents)
        halves = zip(
            _halves(latents.astype(jnp.float32)), (self.key_scale, self.value_scale), strict=True
        )
        keys, values = (to_e4m3(x if scale is None else divide(x, scale)) for x, scale in halves)
        return dataclasses.replace(self, keys=keys, values=values)

    def dequantize(self) -> KeysAndValues:
        """See `KeyValueRows.dequantize`."""
        stored = ((self.keys, self.key_scale), (self.values, self.value_scale))
        keys, values = (
            to_bf16(x.astype(jnp.float32) * (1.0 if scale is None else scale))
            for x, scale in stored
        )
        return keys, values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP4KeyValues(KeyValueRows):
    """e2m1 keys and values with block scales: 576 bytes per token for 4 heads of 128.

    Codes and scales follow the rule of `FP4Rows`, with blocks of 16 values of one head. The leaves
    are the four buffers of SGLang's `MHATokenToKVPoolFP4`, of which a token's scale bytes are
    those of its heads one after the other.

    Attributes:
        keys: the codes, two to a byte.
        values: likewise.
        key_scales: the scale bytes of the keys.
        value_scales: those of the values.
    """

    keys: UInt8[Array, "*tokens kv_heads half_dim"]
    values: UInt8[Array, "*tokens kv_heads half_dim"]
    key_scales: UInt8[Array, "*tokens blocks"]
    value_scales: UInt8[Array, "*tokens blocks"]

    @property
    def kv_cache_dtype(self) -> str:
        """See `KeyValueRows.kv_cache_dtype`."""
        return "fp4_e2m1"

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        row = ((self.kv_heads, self.head_dim // 2), jnp.uint8)
        scales = ((self.kv_heads * self.head_dim // FP4_BLOCK,), jnp.uint8)
        return {"keys": row, "values": row, "key_scales": scales, "value_scales": scales}

    def encode(self, latents: Float[Array, "*tokens 2 kv_heads head_dim"]) -> Self:
        """See `KeyValueRows.encode`."""
        self._check_values(latents)
        (keys, key_scales), (values, value_scales) = map(encode_fp4, _halves(latents))
        tokens = keys.shape[:-2]
        return dataclasses.replace(
            self,
            keys=keys,
            values=values,
            key_scales=key_scales.reshape(*tokens, -1),
            value_scales=value_scales.reshape(*tokens, -1),
        )

    def dequantize(self) -> KeysAndValues:
        """See `KeyValueRows.dequantize`."""
        heads = (*self.shape, self.kv_heads, self.head_dim // FP4_BLOCK)
        keys, values = (
            decode_fp4(codes, scales.reshape(heads))
            for codes, scales in (
                (self.keys, self.key_scales),
                (self.values, self.value_scales),
            )
        )
        return keys, values


def zero_key_values(
    kv_cache_dtype: str,
    shape: tuple[int, ...],
    *,
    kv_heads: int,
    head_dim: int,
    key_scale: Array | float | None = None,
    value_scale: Array | float | None = None,
) -> KeyValueRows:
    """Keys and values of zeros with token axes `shape`, e.g. `(pages, page_size)`.

    Args:
        kv_cache_dtype: "bfloat16", "fp8_e4m3" or "fp4_e2m1".
        shape: the token axes.
        kv_heads: heads of the cache on one device.
        head_dim: values of a head; for FP4 a multiple of 16.
        key_scale: the scale of all keys, for "fp8_e4m3" alone; None is exactly 1.
        value_scale: likewise, of all values.

    Raises:
        ValueError: there is no such dtype, or it is not defined for these sizes or scales.
    """
    if kv_heads < 1 or head_dim < 1:
        raise ValueError(f"{kv_heads=} {head_dim=}: expected at least one head of one value")
    if kv_cache_dtype == "fp4_e2m1" and head_dim % FP4_BLOCK:
        raise ValueError(f"{head_dim=}: 'fp4_e2m1' expects a multiple of {FP4_BLOCK}")
    if kv_cache_dtype != "fp8_e4m3" and (key_scale, value_scale) != (None, None):
        raise ValueError(
            f"{key_scale=} {value_scale=}: expected None, {kv_cache_dtype!r} has no scale for all"
        )
    heads = (kv_heads, head_dim)
    match kv_cache_dtype:
        case "bfloat16":
            zeros = jnp.zeros((*shape, *heads), jnp.bfloat16)
            return BF16KeyValues(zeros, zeros, kv_heads=kv_heads, head_dim=head_dim)
        case "fp8_e4m3":
            zeros = jnp.zeros((*shape, *heads), jnp.float8_e4m3fn)
            scales = [
                None if scale is None else jnp.asarray(scale, jnp.float32)
                for scale in (key_scale, value_scale)
            ]
            rows = FP8KeyValues(zeros, zeros, *scales, kv_heads=kv_heads, head_dim=head_dim)
            rows.check()
            return rows
        case "fp4_e2m1":
            codes = jnp.zeros((*shape, kv_heads, head_dim // 2), jnp.uint8)
            bytes_ = jnp.zeros((*shape, kv_heads * head_dim // FP4_BLOCK), jnp.uint8)
            return FP4KeyValues(codes, codes, bytes_, bytes_, kv_heads=kv_heads, head_dim=head_dim)
    raise ValueError(f"{kv_cache_dtype=}: expected {', '.join(map(repr, KEY_VALUE_DTYPES))}")


def quantize_key_values(
    keys: Float[Array, "*tokens kv_heads head_dim"],
    values: Float[Array, "*tokens kv_heads head_dim"],
    kv_cache_dtype: str,
    *,
    key_scale: Array | float | None = None,
    value_scale: Array | float | None = None,
) -> KeyValueRows:
    """Keys and values as a cache stores them, with arithmetic in f32.

    `cache.set(slots, quantize_key_values(...))` appends them to a cache of the same dtype.

    Args:
        keys: bf16 or f32 [..., kv_heads, head_dim].
        values: likewise, of the same shape.
        kv_cache_dtype: see `zero_key_values`.
        key_scale: likewise.
        value_scale: likewise.

    Raises:
        ValueError: shapes or dtypes that do not fit, or what `zero_key_values` refuses.
    """
    if keys.ndim < 2 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"{keys.shape=} {keys.dtype=} {values.shape=} {values.dtype=}: expected both of one "
            "shape [..., kv_heads, head_dim] and one dtype"
        )
    form = zero_key_values(
        kv_cache_dtype,
        (0,),
        kv_heads=keys.shape[-2],
        head_dim=keys.shape[-1],
        key_scale=key_scale,
        value_scale=value_scale,
    )
    return form.encode(jnp.stack([keys, values], axis=-3))


def _halves(both: Array) -> tuple[Array, Array]:
    return both[..., 0, :, :], both[..., 1, :, :]
