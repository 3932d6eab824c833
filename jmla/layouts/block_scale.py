"""FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE: e4m3 with an f32 scale per 128 values, rotary part bf16."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, UInt8

from jmla.layouts._bits import check_packed, check_unpaged, from_u8, to_u8
from jmla.layouts._scales import (
    POW2_FLOOR,
    divide,
    exp2,
    finite_amax,
    scale_blocks,
    smallest_exponent,
    split_blocks,
    to_bf16,
    to_e4m3,
)
from jmla.layouts.base import (
    BLOCK_SCALE_TILE,
    E4M3_MAX,
    KVLayout,
    Rows,
    ScaleFormat,
    check_latents,
    check_multiple,
    check_scale_format,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaleRows(Rows):
    """e4m3 rows with block scales: 656 bytes per token at 512 + 64.

    Packed row: `rank` e4m3 values; one little-endian f32 scale per 128 of them; `rope_dim` bf16
    rotary values. `rank` is a multiple of 128, `rope_dim` may be 0.

    A scale is, by `scale_format` (two engines write the same bytes by two rules):

    - "pow2", FlashMLA's: the smallest power of two, at least 2^-13, that keeps the block within
      +-448.
    - "fp32", SGLang's: amax / 448. A block whose quotient would be subnormal counts as zero:
      scale 0, codes 0.

    NaN stays NaN in its own element and does not enter a scale; an infinity gives its block the
    largest scale and dequantises to itself. Rotary values are rounded to bf16, nothing else.

    Attributes:
        nope: the codes.
        scales: one f32 per 128 codes.
        rope: the rotary values.
        scale_format: which rule the scales follow; static.
    """

    layout: ClassVar[KVLayout] = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE

    nope: Float8e4m3fn[Array, "*tokens rank"]
    scales: Float32[Array, "*tokens blocks"]
    rope: BFloat16[Array, "*tokens rope_dim"]
    scale_format: ScaleFormat = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {
            "nope": ((self.rank,), jnp.float8_e4m3fn),
            "scales": ((self.rank // BLOCK_SCALE_TILE,), jnp.float32),
            "rope": ((self.rope_dim,), jnp.bfloat16),
        }

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], *, rank: int, rope_dim: int, scale_format: ScaleFormat
    ) -> Self:
        """Rows of zeros with token axes `shape`."""
        check_multiple(cls.layout, BLOCK_SCALE_TILE, rank=rank, rope_dim=rope_dim)
        check_scale_format(scale_format)
        return cls(
            jnp.zeros((*shape, rank), jnp.float8_e4m3fn),
            jnp.zeros((*shape, rank // BLOCK_SCALE_TILE), jnp.float32),
            jnp.zeros((*shape, rope_dim), jnp.bfloat16),
            rank=rank,
            rope_dim=rope_dim,
            scale_format=scale_format,
        )

    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """See `Rows.encode`; the scale format is that of these rows."""
        check_latents(latents, self.width)
        blocks = split_blocks(latents[..., : self.rank], BLOCK_SCALE_TILE)
        codes, scales = _pow2(blocks) if self.scale_format == "pow2" else _fp32(blocks)
        return dataclasses.replace(
            self,
            nope=codes.reshape(*latents.shape[:-1], self.rank),
            scales=scales,
            rope=to_bf16(latents[..., self.rank :]),
        )

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """See `Rows.dequantize`."""
        nope = scale_blocks(self.nope, self.scales, BLOCK_SCALE_TILE)
        return jnp.concatenate([nope, self.rope], axis=-1)

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*tokens bytes"]:
        """See `Rows.pack`."""
        check_unpaged(self.layout, page_bytes)
        return jnp.concatenate([to_u8(self.nope), to_u8(self.scales), to_u8(self.rope)], axis=-1)

    def unpack(
        self, packed: UInt8[Array, "*tokens bytes"], *, page_size: int | None = None
    ) -> Self:
        """See `Rows.unpack`."""
        check_unpaged(self.layout, page_size)
        check_packed(packed, self.bytes_per_token, self.layout.name)
        rope_start = self.bytes_per_token - 2 * self.rope_dim
        return dataclasses.replace(
            self,
            nope=from_u8(packed[..., : self.rank], jnp.float8_e4m3fn),
            scales=from_u8(packed[..., self.rank : rope_start], jnp.float32),
            rope=from_u8(packed[..., rope_start:], jnp.bfloat16),
        )


def _pow2(blocks: Float32[Array, "*blocks size"]) -> tuple[Array, Float32[Array, "*blocks"]]:
    exponents = smallest_exponent(finite_amax(blocks), E4M3_MAX, floor=POW2_FLOOR)
    return to_e4m3(blocks * exp2(-exponents)[..., None]), exp2(exponents)


def _fp32(blocks: Float32[Array, "*blocks size"]) -> tuple[Array, Float32[Array, "*blocks"]]:
    scales = divide(finite_amax(blocks), jnp.float32(E4M3_MAX))
    vanishing = scales < float(np.finfo(np.float32).tiny)
    divisor = jnp.where(vanishing, jnp.inf, scales)[..., None]
    return to_e4m3(divide(blocks, divisor)), jnp.where(vanishing, 0.0, scales)
