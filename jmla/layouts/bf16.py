"""BF16: the latent as it is."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, UInt8

from jmla.layouts._bits import check_packed, check_unpaged, from_u8, to_u8
from jmla.layouts._scales import to_bf16
from jmla.layouts.base import KVLayout, Rows, check_latents, check_multiple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BF16Rows(Rows):
    """bf16 rows: 1152 bytes per token at 512 + 64.

    Packed row: the `rank` no-position values, then the `rope_dim` rotary values, 2 bytes each.
    Infinities and NaN are kept; f32 latents are rounded to nearest even.
    """

    layout: ClassVar[KVLayout] = KVLayout.BF16

    latents: BFloat16[Array, "*tokens width"]

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {"latents": ((self.width,), jnp.bfloat16)}

    @classmethod
    def zeros(cls, shape: tuple[int, ...], *, rank: int, rope_dim: int) -> Self:
        """Rows of zeros with token axes `shape`."""
        check_multiple(cls.layout, 1, rank=rank, rope_dim=rope_dim)
        latents = jnp.zeros((*shape, rank + rope_dim), jnp.bfloat16)
        return cls(latents, rank=rank, rope_dim=rope_dim)

    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """See `Rows.encode`."""
        check_latents(latents, self.width)
        return dataclasses.replace(self, latents=to_bf16(latents))

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """The latents, unchanged."""
        return self.latents

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*tokens bytes"]:
        """See `Rows.pack`."""
        check_unpaged(self.layout, page_bytes)
        return to_u8(self.latents)

    def unpack(
        self, packed: UInt8[Array, "*tokens bytes"], *, page_size: int | None = None
    ) -> Self:
        """See `Rows.unpack`."""
        check_unpaged(self.layout, page_size)
        check_packed(packed, self.bytes_per_token, self.layout.name)
        return dataclasses.replace(self, latents=from_u8(packed, jnp.bfloat16))
