"""Index keys as the pages of another engine, read and written where they are."""

import dataclasses

import jax
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, UInt8

from jmla.layouts._paged import PagedTokens
from jmla.layouts.base import ScaleFormat, check_scale_format
from jmla.layouts.index_keys import IndexKeyRows, index_keys_from_bytes

_SCALE_BYTES = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedIndexKeyRows(PagedTokens):
    """The keys of `IndexKeyRows` in pages: 8448 bytes for 64 keys of 128 values.

    A cache may hold them in the place of those; `paged_index_keys` makes them. Keys are unpacked
    once they are gathered, so that no copy of the cache is made.

    Attributes:
        packed: whole pages, in the order that `IndexKeyRows` tells, of any stride that holds one.
        page_size: tokens of a page; None for keys that stand alone. Static.
        dim: the length of a key; static.
        scale_format: which rule the scales follow; static.
        hadamard: see `IndexKeyRows`; static.
    """

    dim: int = dataclasses.field(kw_only=True, metadata={"static": True})
    scale_format: ScaleFormat = dataclasses.field(
        kw_only=True, default="fp32", metadata={"static": True}
    )
    hadamard: bool = dataclasses.field(kw_only=True, default=False, metadata={"static": True})

    @property
    def value_bytes(self) -> int:
        """See `PagedTokens.value_bytes`: the codes."""
        return self.dim

    @property
    def footer_bytes(self) -> int:
        """See `PagedTokens.footer_bytes`: the scale."""
        return _SCALE_BYTES

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one key and its scale."""
        return self.token_bytes

    @property
    def keys(self) -> Float8e4m3fn[Array, "*tokens dim"]:
        """The codes: a copy."""
        return self.unpacked().keys

    @property
    def scales(self) -> Float32[Array, "*tokens"]:
        """The scales: a copy."""
        return self.unpacked().scales

    def unpacked(self) -> IndexKeyRows:
        """The same keys with an array for each part: a copy."""
        return index_keys_from_bytes(
            self.packed,
            page_size=self.page_size or 1,
            dim=self.dim,
            scale_format=self.scale_format,
            hadamard=self.hadamard,
        ).reshape(*self.shape)

    def unpacked_form(self) -> IndexKeyRows:
        """No keys, of the format of `unpacked`."""
        return IndexKeyRows.zeros(
            (0,), dim=self.dim, scale_format=self.scale_format, hadamard=self.hadamard
        )

    def encode(self, latents: Float[Array, "*tokens dim"]) -> "PagedIndexKeyRows":
        """See `IndexKeyRows.encode`; the keys stand alone."""
        rows = self.unpacked_form().encode(latents)
        packed = rows.reshape(*rows.shape, 1).pack()
        return dataclasses.replace(self, packed=packed, page_size=None)

    def dequantize(self) -> BFloat16[Array, "*tokens dim"]:
        """See `IndexKeyRows.dequantize`."""
        return self.unpacked().dequantize()

    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*pages page_bytes"]:
        """The bytes as they are, unless another stride is asked for."""
        if page_bytes in (None, self.packed.shape[-1]):
            return self.packed
        return self.unpacked().pack(page_bytes=page_bytes)


def paged_index_keys(
    packed: UInt8[Array, "*pages page_bytes"],
    *,
    page_size: int,
    dim: int = 128,
    scale_format: ScaleFormat = "fp32",
    hadamard: bool = False,
) -> PagedIndexKeyRows:
    """`packed` itself as index keys of token shape `[*pages, page_size]`.

    Raises:
        ValueError: `packed` is not u8, too narrow for a page, or a size is out of range.
    """
    check_scale_format(scale_format)
    if page_size < 1 or dim < 1 or packed.ndim == 0:
        raise ValueError(f"{packed.shape=} {page_size=} {dim=}: expected pages of 1 or more keys")
    keys = PagedIndexKeyRows(
        packed, page_size=page_size, dim=dim, scale_format=scale_format, hadamard=hadamard
    )
    keys.check()
    return keys
