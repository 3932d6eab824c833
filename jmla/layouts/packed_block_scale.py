"""Block-scale rows as the packed bytes of another engine, read and written where they are."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, UInt8

from jmla.layouts._bits import check_packed, check_unpaged
from jmla.layouts.base import KVLayout, Rows, ScaleFormat
from jmla.layouts.block_scale import BlockScaleRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBlockScaleRows(Rows):
    """The rows of `BlockScaleRows`, packed: a cache that another engine reads or writes.

    They take the same place in every op. Rows are unpacked once they are gathered, so that no
    copy of the cache is made; `jmla.from_bytes(..., in_place=True)` makes them.

    Attributes:
        packed: the bytes, in the order that `BlockScaleRows` tells.
        scale_format: which rule the scales follow; static.
    """

    layout: ClassVar[KVLayout] = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE

    packed: UInt8[Array, "*tokens bytes"]
    scale_format: ScaleFormat = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {"packed": ((self.bytes_per_token,), jnp.uint8)}

    @classmethod
    def like(cls, rows: BlockScaleRows, packed: UInt8[Array, "*tokens bytes"]) -> Self:
        """`packed` as rows of the format of `rows`, whose data is not used.

        Raises:
            ValueError: `packed` is not u8, or its last axis is not a row.
        """
        form = cls(packed, rank=rows.rank, rope_dim=rows.rope_dim, scale_format=rows.scale_format)
        return form.unpack(packed)

    def unpacked(self) -> BlockScaleRows:
        """The same rows with an array for each part: a copy."""
        return self.unpacked_form().unpack(self.packed)

    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """See `Rows.encode`; the scale format is that of these rows."""
        return dataclasses.replace(self, packed=self.unpacked_form().encode(latents).pack())

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """See `Rows.dequantize`."""
        return self.unpacked().dequantize()

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*tokens bytes"]:
        """The bytes as they are."""
        check_unpaged(self.layout, page_bytes)
        return self.packed

    def unpack(
        self, packed: UInt8[Array, "*tokens bytes"], *, page_size: int | None = None
    ) -> Self:
        """Other bytes of the same format, as they are."""
        check_unpaged(self.layout, page_size)
        check_packed(packed, self.bytes_per_token, self.layout.name)
        return dataclasses.replace(self, packed=packed)

    def unpacked_form(self) -> BlockScaleRows:
        """No rows, of the format of `unpacked`."""
        return BlockScaleRows.zeros(
            (0,), rank=self.rank, rope_dim=self.rope_dim, scale_format=self.scale_format
        )
