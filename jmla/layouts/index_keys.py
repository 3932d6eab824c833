"""The keys by which the indexer scores tokens: e4m3 with one f32 scale per token."""

import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, UInt8

from jmla.layouts._bits import from_u8, join_pages, split_pages, to_u8
from jmla.layouts._scales import (
    divide,
    exp2,
    finite_amax,
    scale_blocks,
    smallest_exponent,
    split_blocks,
    to_e4m3,
)
from jmla.layouts.base import (
    E4M3_MAX,
    ScaleFormat,
    TokenRows,
    check_latents,
    check_scale_format,
)

_SCALE_BYTES = 4
_SMALLEST_AMAX = 1e-4
_POW2_FLOOR = -22  # ceil(log2(1e-4 / 448))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexKeyRows(TokenRows):
    """Index keys: dim + 4 bytes per token.

    Packed page of P tokens: P times `dim` e4m3 values, then P little-endian f32 scales.

    A scale is, by `scale_format`: "fp32", max(amax, 1e-4) / 448; "pow2", the smallest power of two
    that is not less than that. Logits do not depend on which. NaN stays NaN in its own element; an
    infinity gives its key the largest scale.

    Attributes:
        keys: the codes.
        scales: one f32 per token.
        scale_format: which rule the scales follow; static.
        hadamard: whether keys are rotated by `jmla.hadamard_rotation` before they are quantised, by
            whoever gives them, as queries then must be; static.
    """

    keys: Float8e4m3fn[Array, "*tokens dim"]
    scales: Float32[Array, "*tokens"]
    scale_format: ScaleFormat = dataclasses.field(
        kw_only=True, default="fp32", metadata={"static": True}
    )
    hadamard: bool = dataclasses.field(kw_only=True, default=False, metadata={"static": True})

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {"keys": ((self.dim,), jnp.float8_e4m3fn), "scales": ((), jnp.float32)}

    @property
    def dim(self) -> int:
        """The length of a key."""
        return self.keys.shape[-1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one key and its scale."""
        return self.dim + _SCALE_BYTES

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, ...],
        *,
        dim: int,
        scale_format: ScaleFormat = "fp32",
        hadamard: bool = False,
    ) -> Self:
        """Keys of zeros, scales 0, with token axes `shape`."""
        check_scale_format(scale_format)
        if dim < 1:
            raise ValueError(f"{dim=}: expected 1 or more, the length of an index key")
        keys = jnp.zeros((*shape, dim), jnp.float8_e4m3fn)
        scales = jnp.zeros(shape, jnp.float32)
        return cls(keys, scales, scale_format=scale_format, hadamard=hadamard)

    def encode(self, keys: Float[Array, "*tokens dim"]) -> Self:
        """Quantises bf16 or f32 keys to the format of these rows, whose data is not used."""
        check_latents(keys, self.dim)
        codes, scales = _quantize(keys, self.scale_format)
        return dataclasses.replace(self, keys=codes, scales=scales)

    def dequantize(self) -> BFloat16[Array, "*tokens dim"]:
        """The keys: an f32 product, rounded once to bf16."""
        return scale_blocks(self.keys, self.scales[..., None], self.dim)

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*pages page_bytes"]:
        """Whole pages: the last token axis is a page.

        Args:
            page_bytes: the stride of a page; None is `page_size * (dim + 4)`, unpadded.
        """
        if not self.shape:
            raise ValueError(f"{self.shape=}: expected token axes that end in a page; reshape")
        if page_bytes is None:
            page_bytes = self.shape[-1] * self.bytes_per_token
        return join_pages(to_u8(self.keys), to_u8(self.scales[..., None]), page_bytes)


def quantize_index_keys(
    keys: Float[Array, "*tokens dim"], *, scale_format: ScaleFormat = "fp32"
) -> IndexKeyRows:
    """Index keys in e4m3 with one scale per token.

    Args:
        keys: bf16 or f32 `[..., dim]`.
        scale_format: see `IndexKeyRows`.

    Raises:
        ValueError: another dtype, no last axis, or an unknown scale format.
    """
    check_scale_format(scale_format)
    check_latents(keys, keys.shape[-1] if keys.ndim else 1)
    codes, scales = _quantize(keys, scale_format)
    return IndexKeyRows(codes, scales, scale_format=scale_format)


def index_keys_from_bytes(
    packed: UInt8[Array, "*pages page_bytes"],
    *,
    page_size: int,
    dim: int = 128,
    scale_format: ScaleFormat = "fp32",
    hadamard: bool = False,
) -> IndexKeyRows:
    """The reverse of `IndexKeyRows.pack`, exact: token shape `[*pages, page_size]`.

    Raises:
        ValueError: `packed` is not u8, or too narrow for a page.
    """
    check_scale_format(scale_format)
    keys, scales = split_pages(packed, page_size, dim, _SCALE_BYTES)
    return IndexKeyRows(
        from_u8(keys, jnp.float8_e4m3fn),
        from_u8(scales, jnp.float32)[..., 0],
        scale_format=scale_format,
        hadamard=hadamard,
    )


def _quantize(keys: Array, scale_format: ScaleFormat) -> tuple[Array, Array]:
    blocks = split_blocks(keys, keys.shape[-1])
    amax = finite_amax(blocks)
    if scale_format == "pow2":
        exponents = smallest_exponent(amax, E4M3_MAX, floor=_POW2_FLOOR)
        scales, codes = exp2(exponents), to_e4m3(blocks * exp2(-exponents)[..., None])
    else:
        scales = divide(jnp.maximum(amax, _SMALLEST_AMAX), jnp.float32(E4M3_MAX))
        codes = to_e4m3(divide(blocks, scales[..., None]))
    return codes.reshape(keys.shape), scales[..., 0]
