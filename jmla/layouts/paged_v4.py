"""FP8_V4 pages as the packed bytes of another engine, read and written where they are."""

import dataclasses
from typing import ClassVar, Self

import jax
from jaxtyping import Array, BFloat16, Float, UInt8

from jmla.layouts._bits import check_packed
from jmla.layouts._paged import PagedTokens
from jmla.layouts.base import KVLayout, Rows, v4_scale_bytes
from jmla.layouts.v4 import V4Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedV4Rows(PagedTokens, Rows):
    """The rows of `V4Rows` in split pages: a cache that another engine reads or writes.

    They take the same place in every op. Rows are unpacked once they are gathered, so that no
    copy of the cache is made; `jmla.from_bytes(..., in_place=True)` makes them. What `gather` and
    `encode` give are rows that stand alone: pages of one token, whose axis is left out.

    Attributes:
        packed: whole pages, in the order that `V4Rows` tells, of any stride that holds a page.
        page_size: tokens of a page; None for rows that stand alone. Static.
    """

    layout: ClassVar[KVLayout] = KVLayout.FP8_V4

    @property
    def value_bytes(self) -> int:
        """See `PagedTokens.value_bytes`: the codes, then the rotary values."""
        return self.rank + 2 * self.rope_dim

    @property
    def footer_bytes(self) -> int:
        """See `PagedTokens.footer_bytes`: the scale bytes, padded."""
        return v4_scale_bytes(self.rank)

    @property
    def value_dim(self) -> int:
        """The whole row: rank plus rope_dim."""
        return self.width

    @classmethod
    def like(
        cls, rows: V4Rows, packed: UInt8[Array, "*pages page_bytes"], page_size: int | None
    ) -> Self:
        """`packed` as pages of rows of the format of `rows`, whose data is not used.

        Raises:
            ValueError: `packed` is not u8, or too narrow for a page.
        """
        form = cls(packed, rank=rows.rank, rope_dim=rows.rope_dim, page_size=page_size)
        return form.unpack(packed, page_size=page_size)

    def unpacked(self) -> V4Rows:
        """The same rows with an array for each part: a copy."""
        rows = self.unpacked_form().unpack(self.packed, page_size=self.page_size or 1)
        return rows.reshape(*self.shape)

    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """See `Rows.encode`; the rows stand alone."""
        rows = self.unpacked_form().encode(latents)
        pages = rows.reshape(*rows.shape, 1).pack(page_bytes=self.bytes_per_token)
        return dataclasses.replace(self, packed=pages, page_size=None)

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """See `Rows.dequantize`."""
        return self.unpacked().dequantize()

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*pages page_bytes"]:
        """The bytes as they are, unless another stride is asked for."""
        if page_bytes in (None, self.packed.shape[-1]):
            return self.packed
        return self.unpacked().pack(page_bytes=page_bytes)

    def unpack(
        self, packed: UInt8[Array, "*pages page_bytes"], *, page_size: int | None = None
    ) -> Self:
        """Other pages of the same format, as they are."""
        if page_size is None or page_size < 1:
            raise ValueError(f"{page_size=}: expected the number of tokens in an FP8_V4 page")
        used = page_size * self.bytes_per_token
        check_packed(packed, max(used, packed.shape[-1]) if packed.ndim else used, "FP8_V4 pages")
        return dataclasses.replace(self, packed=packed, page_size=page_size)

    def unpacked_form(self) -> V4Rows:
        """No rows, of the format of `unpacked`."""
        return V4Rows.zeros((0,), rank=self.rank, rope_dim=self.rope_dim)
