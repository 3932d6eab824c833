"""FP8_V4 pages as the packed bytes of another engine, read and written where they are."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int, UInt8

from jmla.layouts._bits import check_packed
from jmla.layouts.base import KVLayout, Rows, check_slots, v4_scale_bytes
from jmla.layouts.v4 import V4Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedV4Rows(Rows):
    """The rows of `V4Rows` in split pages: a cache that another engine reads or writes.

    They take the same place in every op. Rows are unpacked once they are gathered, so that no
    copy of the cache is made; `jmla.from_bytes(..., in_place=True)` makes them. What `gather` and
    `encode` give are rows that stand alone: pages of one token, whose axis is left out.

    Attributes:
        packed: whole pages, in the order that `V4Rows` tells, of any stride that holds a page.
        page_size: tokens of a page; None for rows that stand alone. Static.
    """

    layout: ClassVar[KVLayout] = KVLayout.FP8_V4

    packed: UInt8[Array, "*pages page_bytes"]
    page_size: int | None = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`; of pages, what a page has."""
        size = self.bytes_per_token if self.page_size is None else self.packed.shape[-1]
        return {"packed": ((size,), jnp.uint8)}

    @property
    def shape(self) -> tuple[int, ...]:
        """The token axes; the last is a page, but for rows that stand alone."""
        pages = tuple(self.packed.shape[:-1])
        return pages if self.page_size is None else (*pages, self.page_size)

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

    def check(self) -> None:
        """See `TokenRows.check`; a page must fit in its stride."""
        if self.page_size is None:
            super().check()
            return
        used = self.page_size * self.bytes_per_token
        if self.packed.dtype != jnp.uint8 or self.packed.shape[-1] < used:
            raise ValueError(
                f"PagedV4Rows.packed: {self.packed.shape=} {self.packed.dtype=}: expected uint8 "
                f"with a last axis of at least {used} bytes, a page of {self.page_size} tokens; "
                "build rows with from_bytes"
            )

    def reshape(self, *token_axes: int) -> Self:
        """The same rows under other axes, of which the last stays a page; one may be -1."""
        if self.page_size is None:
            return super().reshape(*token_axes)
        if token_axes[-1:] != (self.page_size,):
            raise ValueError(
                f"{token_axes=}: expected a last axis of {self.page_size=}: rows that stay packed "
                "stay in their pages; use from_bytes without in_place for other axes"
            )
        packed = self.packed.reshape(*token_axes[:-1], self.packed.shape[-1])
        return dataclasses.replace(self, packed=packed)

    def flat(self) -> Self:
        """The same rows with one axis of pages, or of rows that stand alone."""
        return super().flat() if self.page_size is None else self.reshape(-1, self.page_size)

    def gather(self, slots: Int[Array, "..."]) -> Self:
        """See `TokenRows.gather`; the rows stand alone."""
        if self.page_size is None:
            return super().gather(slots)
        check_slots(slots)
        starts = self._starts(slots.reshape(-1))
        if self.num_slots == 0:  # JAX refuses to gather from an empty axis
            packed = jnp.zeros((slots.size, self.bytes_per_token), jnp.uint8)
        else:
            pages = self.flat().packed
            packed = jnp.concatenate([_take(pages, start, size) for start, size in starts], axis=-1)
        packed = packed.reshape(*slots.shape, self.bytes_per_token)
        return dataclasses.replace(self, packed=packed, page_size=None)

    def set(self, slots: Int[Array, "..."], new: Self) -> Self:
        """See `TokenRows.set`; `new` are rows that stand alone, as `encode` gives them."""
        if self.page_size is None:
            return super().set(slots, new)
        check_slots(slots)
        form: object = jax.tree.structure(dataclasses.replace(self, page_size=None))
        theirs: object = jax.tree.structure(new)
        if form != theirs:
            raise ValueError(f"new rows are {theirs}: expected the format of the cache, {form}")
        if new.shape != slots.shape:
            raise ValueError(f"{new.shape=}: expected one row per slot, {slots.shape=}")
        pages, rows = self.flat().packed, new.flat().packed
        first = 0
        for start, size in self._starts(slots.reshape(-1)):
            pages = _put(pages, start, rows[:, first : first + size])
            first += size
        return dataclasses.replace(self, packed=pages.reshape(self.packed.shape))

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

    def _starts(self, slots: Int[Array, " n"]) -> list[tuple[Int[Array, "n 2"], int]]:
        """Where a slot's values lie, then its scale bytes: page and byte of each, and how many."""
        assert self.page_size is not None
        footer = v4_scale_bytes(self.rank)
        values = self.bytes_per_token - footer
        named = (slots >= 0) & (slots < self.num_slots)
        # A page outside the cache: nothing is read there, and zeros come back.
        page = jnp.where(named, slots // self.page_size, jnp.iinfo(jnp.int32).max)
        place = jnp.where(named, slots % self.page_size, 0)
        behind = self.page_size * values
        return [
            (jnp.stack([page, place * values], axis=-1), values),
            (jnp.stack([page, behind + place * footer], axis=-1), footer),
        ]


def _take(pages: UInt8[Array, "p b"], starts: Int[Array, "n 2"], size: int) -> UInt8[Array, "n s"]:
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.gather(pages, starts, numbers, (1, size), mode=mode, fill_value=0)


def _put(
    pages: UInt8[Array, "p b"], starts: Int[Array, "n 2"], rows: UInt8[Array, "n s"]
) -> UInt8[Array, "p b"]:
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.scatter(pages, starts, rows, numbers, mode=mode)
