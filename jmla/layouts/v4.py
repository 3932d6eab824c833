"""FP8_V4: e4m3 with a power-of-two scale per 64 values, rotary part bf16, in split pages."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, UInt8

from jmla.layouts._bits import from_u8, join_pages, split_pages, to_u8
from jmla.layouts._scales import (
    POW2_FLOOR,
    e8m0_to_f32,
    exp2,
    finite_amax,
    scale_blocks,
    smallest_exponent,
    split_blocks,
    to_bf16,
    to_e4m3,
)
from jmla.layouts.base import (
    E4M3_MAX,
    V4_TILE,
    KVLayout,
    Rows,
    check_latents,
    check_multiple,
    v4_scale_bytes,
)

_PAGE_ALIGNMENT = 576  # serving pools round the stride of a page up to this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class V4Rows(Rows):
    """e4m3 rows of the DeepSeek-V4 caches: 584 bytes per token at 448 + 64.

    Packed page of P tokens: P times (`rank` e4m3 values, then `rope_dim` bf16 rotary values);
    then P times (one byte b per 64 e4m3 values, which stands for 2^(b - 127), padded with zeros to
    a multiple of 8 bytes); then padding up to the stride of a page. `rank` is a multiple of 64.

    The scale is the smallest power of two, at least 2^-13, that keeps its 64 values within +-448.
    NaN stays NaN in its own element and does not enter a scale; an infinity gives its block the
    largest scale and dequantises to itself. The attention value is the whole row.

    Attributes:
        nope: the codes.
        exponents: the scale bytes, without padding.
        rope: the rotary values.
    """

    layout: ClassVar[KVLayout] = KVLayout.FP8_V4

    nope: Float8e4m3fn[Array, "*tokens rank"]
    exponents: UInt8[Array, "*tokens blocks"]
    rope: BFloat16[Array, "*tokens rope_dim"]

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {
            "nope": ((self.rank,), jnp.float8_e4m3fn),
            "exponents": ((self.rank // V4_TILE,), jnp.uint8),
            "rope": ((self.rope_dim,), jnp.bfloat16),
        }

    @property
    def value_dim(self) -> int:
        """The whole row: rank plus rope_dim."""
        return self.width

    @classmethod
    def zeros(cls, shape: tuple[int, ...], *, rank: int, rope_dim: int) -> Self:
        """Rows of zeros with token axes `shape`; the scale bytes are 0 too."""
        check_multiple(cls.layout, V4_TILE, rank=rank, rope_dim=rope_dim)
        return cls(
            jnp.zeros((*shape, rank), jnp.float8_e4m3fn),
            jnp.zeros((*shape, rank // V4_TILE), jnp.uint8),
            jnp.zeros((*shape, rope_dim), jnp.bfloat16),
            rank=rank,
            rope_dim=rope_dim,
        )

    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """See `Rows.encode`."""
        check_latents(latents, self.width)
        blocks = split_blocks(latents[..., : self.rank], V4_TILE)
        exponents = smallest_exponent(finite_amax(blocks), E4M3_MAX, floor=POW2_FLOOR)
        codes = to_e4m3(blocks * exp2(-exponents)[..., None])
        return dataclasses.replace(
            self,
            nope=codes.reshape(*latents.shape[:-1], self.rank),
            exponents=(exponents + 127).astype(jnp.uint8),
            rope=to_bf16(latents[..., self.rank :]),
        )

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """See `Rows.dequantize`."""
        nope = scale_blocks(self.nope, e8m0_to_f32(self.exponents), V4_TILE)
        return jnp.concatenate([nope, self.rope], axis=-1)

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*pages page_bytes"]:
        """Whole pages: the last token axis is a page.

        Args:
            page_bytes: the stride of a page; None rounds up to a multiple of 576, as serving pools
                do. The unpadded stride is `page_size * bytes_per_token`.
        """
        if not self.shape:
            raise ValueError(f"{self.shape=}: expected token axes that end in a page; reshape")
        if page_bytes is None:
            page_bytes = -(-self.shape[-1] * self.bytes_per_token // _PAGE_ALIGNMENT)
            page_bytes *= _PAGE_ALIGNMENT
        values = jnp.concatenate([to_u8(self.nope), to_u8(self.rope)], axis=-1)
        spare = v4_scale_bytes(self.rank) - self.exponents.shape[-1]
        padding = jnp.zeros((*self.shape, spare), jnp.uint8)
        footer = jnp.concatenate([self.exponents, padding], axis=-1)
        return join_pages(values, footer, page_bytes)

    def unpack(
        self, packed: UInt8[Array, "*pages page_bytes"], *, page_size: int | None = None
    ) -> Self:
        """The reverse of `pack`, for any stride: token shape [*pages, page_size].

        Args:
            packed: whole pages; what pads a page or a token's scale bytes is ignored.
            page_size: tokens in a page; required.
        """
        if page_size is None:
            raise ValueError(f"{page_size=}: expected the number of tokens in an FP8_V4 page")
        value_bytes = self.rank + 2 * self.rope_dim
        values, footer = split_pages(packed, page_size, value_bytes, v4_scale_bytes(self.rank))
        return dataclasses.replace(
            self,
            nope=from_u8(values[..., : self.rank], jnp.float8_e4m3fn),
            exponents=footer[..., : self.rank // V4_TILE],
            rope=from_u8(values[..., self.rank :], jnp.bfloat16),
        )
