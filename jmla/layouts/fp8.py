"""FP8_NOPE_FP8_ROPE: e4m3 values with at most one scale for the whole tensor."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, UInt8

from jmla.layouts._bits import check_packed, check_unpaged, from_u8, to_u8
from jmla.layouts._scales import divide, to_bf16, to_e4m3
from jmla.layouts.base import KVLayout, Rows, check_latents, check_multiple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Rows(Rows):
    """e4m3 rows: 576 bytes per token at 512 + 64.

    Packed row: the `rank` no-position values, then the `rope_dim` rotary values, one byte each.
    The scale is not part of the packed row.

    A value beyond 448 times the scale, infinities included, saturates; NaN stays NaN.

    Attributes:
        values: the codes.
        scale: f32 scalar that multiplies each code; None is exactly 1, known at trace time.
    """

    layout: ClassVar[KVLayout] = KVLayout.FP8_NOPE_FP8_ROPE

    values: Float8e4m3fn[Array, "*tokens width"]
    scale: Float32[Array, ""] | None = None

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {"values": ((self.width,), jnp.float8_e4m3fn)}

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], *, rank: int, rope_dim: int, scale: Array | float | None = None
    ) -> Self:
        """Rows of zeros with token axes `shape`.

        Raises:
            ValueError: `scale` is not a scalar.
        """
        check_multiple(cls.layout, 1, rank=rank, rope_dim=rope_dim)
        if scale is not None:
            scale = jnp.asarray(scale, jnp.float32)
            if scale.shape != ():
                raise ValueError(f"{scale.shape=}: expected a scalar, one scale for the tensor")
        values = jnp.zeros((*shape, rank + rope_dim), jnp.float8_e4m3fn)
        return cls(values, scale, rank=rank, rope_dim=rope_dim)

    def check(self) -> None:
        """See `TokenRows.check`; the scale must be an f32 scalar."""
        super().check()
        if self.scale is not None and (self.scale.shape, self.scale.dtype) != ((), jnp.float32):
            raise ValueError(
                f"FP8Rows.scale: {self.scale.shape=} {self.scale.dtype=}: expected an f32 scalar, "
                "or None for exactly 1"
            )

    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """See `Rows.encode`; the scale is that of these rows."""
        check_latents(latents, self.width)
        x = latents.astype(jnp.float32)
        if self.scale is not None:
            x = divide(x, self.scale)
        return dataclasses.replace(self, values=to_e4m3(x))

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """See `Rows.dequantize`."""
        x = self.values.astype(jnp.float32)
        return to_bf16(x if self.scale is None else x * self.scale)

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*tokens bytes"]:
        """See `Rows.pack`."""
        check_unpaged(self.layout, page_bytes)
        return to_u8(self.values)

    def unpack(
        self, packed: UInt8[Array, "*tokens bytes"], *, page_size: int | None = None
    ) -> Self:
        """See `Rows.unpack`."""
        check_unpaged(self.layout, page_size)
        check_packed(packed, self.bytes_per_token, self.layout.name)
        return dataclasses.replace(self, values=from_u8(packed, jnp.float8_e4m3fn))
