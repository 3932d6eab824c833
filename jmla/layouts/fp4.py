"""FP4: e2m1 values, two to a byte, with a power-of-two scale per 16."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, UInt8

from jmla.layouts._bits import check_packed, check_unpaged
from jmla.layouts._scales import (
    e8m0_to_f32,
    exp2,
    finite_amax,
    is_negative,
    smallest_exponent,
    split_blocks,
    to_bf16,
)
from jmla.layouts.base import FP4_BLOCK, KVLayout, Rows, check_latents, check_multiple

_E2M1_MAX = 6.0
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_FLOOR = -33  # ceil(log2(1e-10)): the scale of a block of zeros is 2^-33, byte 94
_NAN_BYTE = 255


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP4Rows(Rows):
    """e2m1 rows with block scales: 324 bytes per token at 512 + 64.

    Packed row: (rank + rope_dim) / 2 data bytes, the even element in the low four bits, then one
    scale byte b per 16 elements, which stands for 2^(b - 127). Other engines keep the two parts in
    two buffers: those are the leaves. `rank` and `rope_dim` are multiples of 16.

    The scale is the smallest power of two, at least 2^-33, that keeps the block within +-6. A
    value on the middle between two codes goes to the larger magnitude. -0.0 loses its sign, a
    negative value that rounds to zero keeps it.

    A block with a NaN gets the scale byte 255 and is NaN throughout, since e2m1 has no NaN; an
    infinity gives its block the largest scale and dequantises to itself.

    Attributes:
        packed: the codes.
        exponents: the scale bytes.
    """

    layout: ClassVar[KVLayout] = KVLayout.FP4

    packed: UInt8[Array, "*tokens half_width"]
    exponents: UInt8[Array, "*tokens blocks"]

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {
            "packed": ((self.width // 2,), jnp.uint8),
            "exponents": ((self.width // FP4_BLOCK,), jnp.uint8),
        }

    @classmethod
    def zeros(cls, shape: tuple[int, ...], *, rank: int, rope_dim: int) -> Self:
        """Rows of zeros with token axes `shape`; the scale bytes are 0 too."""
        check_multiple(cls.layout, FP4_BLOCK, rank=rank, rope_dim=rope_dim)
        if rope_dim % FP4_BLOCK:
            raise ValueError(f"{rope_dim=}: FP4 expects a multiple of {FP4_BLOCK}; pad the latents")
        width = rank + rope_dim
        return cls(
            jnp.zeros((*shape, width // 2), jnp.uint8),
            jnp.zeros((*shape, width // FP4_BLOCK), jnp.uint8),
            rank=rank,
            rope_dim=rope_dim,
        )

    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """See `Rows.encode`."""
        check_latents(latents, self.width)
        packed, exponents = encode_fp4(latents)
        return dataclasses.replace(self, packed=packed, exponents=exponents)

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """See `Rows.dequantize`."""
        return decode_fp4(self.packed, self.exponents)

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*tokens bytes"]:
        """See `Rows.pack`."""
        check_unpaged(self.layout, page_bytes)
        return jnp.concatenate([self.packed, self.exponents], axis=-1)

    def unpack(
        self, packed: UInt8[Array, "*tokens bytes"], *, page_size: int | None = None
    ) -> Self:
        """See `Rows.unpack`."""
        check_unpaged(self.layout, page_size)
        check_packed(packed, self.bytes_per_token, self.layout.name)
        half = self.width // 2
        return dataclasses.replace(self, packed=packed[..., :half], exponents=packed[..., half:])


def encode_fp4(
    values: Float[Array, "*n width"],
) -> tuple[UInt8[Array, "*n half_width"], UInt8[Array, "*n blocks"]]:
    """The codes and scale bytes of rows whose width is a multiple of 16; see `FP4Rows`."""
    blocks = split_blocks(values, FP4_BLOCK)
    exponents = smallest_exponent(finite_amax(blocks), _E2M1_MAX, floor=_FLOOR)
    codes = _to_e2m1(blocks * exp2(-exponents)[..., None], is_negative(blocks))
    pairs = codes.reshape(*values.shape[:-1], values.shape[-1] // 2, 2)
    scale_bytes = jnp.where(jnp.isnan(blocks).any(-1), _NAN_BYTE, exponents + 127)
    return pairs[..., 0] | (pairs[..., 1] << 4), scale_bytes.astype(jnp.uint8)


def decode_fp4(
    packed: UInt8[Array, "*n half_width"], exponents: UInt8[Array, "*n blocks"]
) -> BFloat16[Array, "*n width"]:
    """The reverse."""
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    codes = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    blocks = split_blocks(_from_e2m1(codes).reshape(shape), FP4_BLOCK)
    return to_bf16(blocks * e8m0_to_f32(exponents)[..., None]).reshape(shape)


def _to_e2m1(x: Float32[Array, "*n"], negative: Array) -> UInt8[Array, "*n"]:
    magnitude = jnp.abs(x)
    code = sum((magnitude >= middle).astype(jnp.uint8) for middle in _E2M1_MIDPOINTS)
    return code | (negative.astype(jnp.uint8) << 3)


def _from_e2m1(code: UInt8[Array, "*n"]) -> Float32[Array, "*n"]:
    magnitude = code.astype(jnp.uint32) & 7
    normal = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    half_or_zero = magnitude * 0x3F000000
    sign = (code.astype(jnp.uint32) >> 3) << 31
    bits = jnp.where(magnitude < 2, half_or_zero, normal) | sign
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
