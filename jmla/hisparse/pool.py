"""Who owns which pages: the accounting outside jit that refuses before anything is lost."""

import dataclasses
from typing import Self

import numpy as np
from jaxtyping import Int32

from jmla.hisparse.sizes import HiSparseSizes


class HiSparseCapacityError(RuntimeError):
    """There are not enough pages, on the host or on the device; nothing has changed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiSparsePool:
    """Pages of host rows and of buffer rows, free or owned by a request. Plain Python, immutable.

    Reserve what the next steps will need before running them; a step itself takes no page. Pass
    the tables to `assign_pages` of every layer, whose tables are the same.

    Attributes:
        sizes: of the states that it accounts for.
        free: host pages that nobody owns, the next to be given last.
        free_buffer: device pages that nobody owns, likewise.
        owned: host pages of each request, in the order of its positions.
        owned_buffer: device pages of each request, in the order of its slots.
    """

    sizes: HiSparseSizes
    free: tuple[int, ...]
    free_buffer: tuple[int, ...]
    owned: tuple[tuple[int, ...], ...]
    owned_buffer: tuple[tuple[int, ...], ...]

    @classmethod
    def empty(cls, sizes: HiSparseSizes) -> Self:
        """With every page free."""
        return cls(
            sizes=sizes,
            free=tuple(reversed(range(sizes.num_pages))),
            free_buffer=tuple(reversed(range(sizes.num_buffer_pages))),
            owned=((),) * sizes.requests,
            owned_buffer=((),) * sizes.requests,
        )

    def reserve(self, request: int, length: int) -> Self:
        """The pool in which a request owns what `length` tokens need; it never shrinks.

        A request that is longer than its buffer owns the whole buffer; a shorter one a slot per
        token, and so it grows with its length.

        Args:
            request: row of the batch.
            length: tokens after the steps to come, the drafts included.

        Raises:
            ValueError: no such request, or a length outside `[0, max_length]`.
            HiSparseCapacityError: too few free pages; the message says how many are missing.
        """
        self._check_request(request)
        if not 0 <= length <= self.sizes.max_length:
            raise ValueError(
                f"{length=}: expected 0 to {self.sizes.max_length=}; make the state with a larger "
                "max_length"
            )
        more = self.sizes.pages_of(length) - len(self.owned[request])
        more_buffer = self.sizes.buffer_pages_of(length) - len(self.owned_buffer[request])
        short = []
        for name, wanted, free in (
            ("num_pages", more, self.free),
            ("num_buffer_pages", more_buffer, self.free_buffer),
        ):
            if wanted > len(free):
                total = getattr(self.sizes, name)
                short.append(f"{wanted} more of sizes.{name}={total} with {len(free)} free")
        if short:
            raise HiSparseCapacityError(
                f"{request=} {length=}: needs {' and '.join(short)}; expected as many free pages: "
                "release a request, admit it later, or make the state with more pages"
            )
        free, owned = _move(self.free, self.owned, request, more)
        free_buffer, owned_buffer = _move(self.free_buffer, self.owned_buffer, request, more_buffer)
        return dataclasses.replace(
            self, free=free, free_buffer=free_buffer, owned=owned, owned_buffer=owned_buffer
        )

    def release(self, request: int) -> Self:
        """The pool in which a request owns nothing. Release it in the states, too.

        Raises:
            ValueError: no such request.
        """
        self._check_request(request)
        return dataclasses.replace(
            self,
            free=self.free + self.owned[request][::-1],
            free_buffer=self.free_buffer + self.owned_buffer[request][::-1],
            owned=_replaced(self.owned, request, ()),
            owned_buffer=_replaced(self.owned_buffer, request, ()),
        )

    @property
    def page_table(self) -> Int32[np.ndarray, "requests pages"]:
        """The host page of each page of positions; -1 for none."""
        return _table(self.owned, self.sizes.max_pages)

    @property
    def buffer_table(self) -> Int32[np.ndarray, "requests buffer_pages"]:
        """The device page of each page of buffer slots; -1 for none."""
        return _table(self.owned_buffer, self.sizes.max_buffer_pages)

    def _check_request(self, request: int) -> None:
        if not 0 <= request < self.sizes.requests:
            raise ValueError(f"{request=}: expected 0 to {self.sizes.requests - 1}, a batch row")


def _move(
    free: tuple[int, ...], owned: tuple[tuple[int, ...], ...], request: int, count: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    if count <= 0:
        return free, owned
    taken = free[: -count - 1 : -1]
    return free[:-count], _replaced(owned, request, owned[request] + taken)


def _replaced(
    owned: tuple[tuple[int, ...], ...], request: int, pages: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    return (*owned[:request], pages, *owned[request + 1 :])


def _table(owned: tuple[tuple[int, ...], ...], width: int) -> Int32[np.ndarray, "requests pages"]:
    table = np.full((len(owned), width), -1, np.int32)
    for request, pages in enumerate(owned):
        table[request, : len(pages)] = pages
    return table
