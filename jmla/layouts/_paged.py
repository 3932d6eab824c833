"""Tokens in split pages of bytes: of a page first all values, then all footers."""

import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt8

from jmla.layouts.base import TokenRows, check_slots


@dataclasses.dataclass(frozen=True)
class PagedTokens(TokenRows):
    """Pages that another engine reads or writes, as they are.

    What `gather` and `encode` give are tokens that stand alone: pages of one token, whose axis is
    left out.

    Attributes:
        packed: whole pages, of any stride that holds a page.
        page_size: tokens of a page; None for tokens that stand alone. Static.
    """

    packed: UInt8[Array, "*pages page_bytes"]
    page_size: int | None = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def value_bytes(self) -> int:
        """Of a token, at the front of its page."""
        raise NotImplementedError

    @property
    def footer_bytes(self) -> int:
        """Of a token, behind the values of its page."""
        raise NotImplementedError

    @property
    def token_bytes(self) -> int:
        """Of a token, in sum."""
        return self.value_bytes + self.footer_bytes

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`; of pages, what a page has."""
        size = self.token_bytes if self.page_size is None else self.packed.shape[-1]
        return {"packed": ((size,), jnp.uint8)}

    @property
    def shape(self) -> tuple[int, ...]:
        """The token axes; the last is a page, but for tokens that stand alone."""
        pages = tuple(self.packed.shape[:-1])
        return pages if self.page_size is None else (*pages, self.page_size)

    def check(self) -> None:
        """See `TokenRows.check`; a page must fit in its stride."""
        if self.page_size is None:
            super().check()
            return
        used = self.page_size * self.token_bytes
        if self.packed.dtype != jnp.uint8 or self.packed.shape[-1] < used:
            raise ValueError(
                f"{type(self).__name__}.packed: {self.packed.shape=} {self.packed.dtype=}: "
                f"expected uint8 with a last axis of at least {used} bytes, a page of "
                f"{self.page_size} tokens; build rows with from_bytes or index_keys_from_bytes"
            )

    def reshape(self, *token_axes: int) -> Self:
        """The same tokens under other axes, of which the last stays a page; one may be -1."""
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
        """The same tokens with one axis of pages, or of tokens that stand alone."""
        return super().flat() if self.page_size is None else self.reshape(-1, self.page_size)

    def gather(self, slots: Int[Array, "..."]) -> Self:
        """See `TokenRows.gather`; the tokens stand alone."""
        if self.page_size is None:
            return super().gather(slots)
        check_slots(slots)
        starts = self._starts(slots.reshape(-1))
        if self.num_slots == 0:  # JAX refuses to gather from an empty axis
            packed = jnp.zeros((slots.size, self.token_bytes), jnp.uint8)
        else:
            pages = self.flat().packed
            packed = jnp.concatenate([_take(pages, start, size) for start, size in starts], axis=-1)
        packed = packed.reshape(*slots.shape, self.token_bytes)
        return dataclasses.replace(self, packed=packed, page_size=None)

    def set(self, slots: Int[Array, "..."], new: Self) -> Self:
        """See `TokenRows.set`; `new` are tokens that stand alone, as `encode` gives them."""
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

    def _starts(self, slots: Int[Array, " n"]) -> list[tuple[Int[Array, "n 2"], int]]:
        """Where a slot's values lie, then its footer: page and byte of each, and how many."""
        assert self.page_size is not None
        footer, values = self.footer_bytes, self.value_bytes
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
