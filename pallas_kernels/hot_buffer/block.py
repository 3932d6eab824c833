"""A block of the grid as one of its threads sees it: its request, its memory, its items."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pallas_kernels.device.memory import load_global, load_shared, store_global
from pallas_kernels.device.simt import Value, i32, i64, loop, minimum, select, when
from pallas_kernels.device.sync import named_barrier
from pallas_kernels.hot_buffer.shape import Shape

BARRIER = 8  # its number; Mosaic's are below
FEW = 4  # items of a thread that its registers hold from one barrier to the next


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of the grid, which works on one request.

    Attributes:
        shape: of the launch.
        threads: how many.
        thread: this one.
        request: the number of the request.
        shared: the address of each part of shared memory, if it has any.
        arrays: the address of each array in global memory.
    """

    shape: Shape
    threads: int
    thread: Value
    request: Value
    shared: Mapping[str, Value]
    arrays: Mapping[str, Value]

    def sync(self) -> None:
        """Joins the threads."""
        named_barrier(BARRIER, self.threads)

    def row(self, name: str, width: int) -> Value:
        """Where the request's row of an array of words begins."""
        return self.arrays[name] + self.request.wide() * i64(4 * width)

    def own(self, count: int) -> "Own":
        """This thread's share of `count` items: consecutive ones, in the order of the threads."""
        each = -(-count // self.threads)
        if each > FEW:
            each = -(-each // FEW) * FEW
        # Rows of words begin at multiples of as many.
        width = next(w for w in (4, 2, 1) if each % w == 0 and count % w == 0)
        return Own(self.thread * each, each, count, each * self.threads == count, width)

    def every(self, count: int, body: Callable[[Value], None]) -> None:
        """`body` of each of `count` items, by one thread each: neighbours by neighbours."""
        for first in range(0, count, self.threads):
            item = self.thread + first
            if first + self.threads <= count:
                body(item)
            else:
                when(item < count, partial(body, item))

    def host_row(self, position: Value) -> Value:
        """The host row of any number as a position of the request; -1 if it has none."""
        shape = self.shape
        return self._listed_row("page_table", position, shape.max_pages, shape.num_pages)

    def buffer_row_of(self, slot: Value) -> Value:
        """`buffer_row` by the table in global memory."""
        shape = self.shape
        return self._listed_row(
            "buffer_table", slot, shape.max_buffer_pages, shape.num_buffer_pages
        )

    def _listed_row(self, table: str, place: Value, width: int, num_pages: int) -> Value:
        size = self.shape.page_size
        known = place.below(width * size)
        number = select(known, place // size, i32(0))
        (page,) = load_global(self.row(table, width) + number.wide() * 4, "r")
        row = page * size + (place - number * size)
        return select(known & page.below(num_pages), row, i32(-1))

    def buffer_row(self, slot: Value) -> Value:
        """The row of the device's pool that a slot of the request is; -1 if it has none."""
        size = self.shape.page_size
        page = slot // size
        (base,) = load_shared(self.shared["bases"] + page * 4, "r")
        return select(base < 0, i32(-1), base + (slot - page * size))


@dataclasses.dataclass(frozen=True)
class Own:
    """Consecutive items of a row of words, those of one thread.

    Attributes:
        first: the first item.
        each: how many.
        count: items that there are, of all threads.
        even: whether every thread has as many.
        width: words that one access takes.
    """

    first: Value
    each: int
    count: int
    even: bool
    width: int

    @property
    def items(self) -> list[Value]:
        """Their numbers."""
        return [self.first + i for i in range(self.each)]

    def in_pieces(
        self, carry: Sequence[Value], body: Callable[..., Sequence[Value]]
    ) -> Sequence[Value]:
        """`carry = body(piece, before, *carry)` of at most `FEW` items each; `before` it are some.

        One piece is no loop.
        """
        if self.each <= FEW:
            return body(self, i32(0), *carry)

        def one(nth: Value, *carry: Value) -> Sequence[Value]:
            before = nth * FEW
            piece = dataclasses.replace(self, first=self.first + before, each=FEW)
            return body(piece, before, *carry)

        return loop(0, i32(self.each // FEW), carry, one)

    def exists(self, item: Value) -> Value:
        """Whether there is such an item."""
        return item < self.count

    def load(self, row: Value, outside: int, cache: str = ".nc") -> list[Value]:
        """The words of the items; `outside` where there is none."""
        words = []
        for i in range(0, self.each, self.width):
            place = self.first + i
            # All of an access exists, or nothing of it.
            safe = place if self.even else minimum(place, self.count - self.width)
            loaded = load_global(row + safe.wide() * 4, "r" * self.width, cache=cache)
            if not self.even:
                exists = place < self.count
                loaded = [select(exists, word, i32(outside)) for word in loaded]
            words += loaded
        return words

    def store(self, row: Value, words: Sequence[Value]) -> None:
        """Stores a word for each item that exists."""
        for i in range(0, self.each, self.width):
            place, some = self.first + i, list(words[i : i + self.width])

            def put(place: Value = place, some: list[Value] = some) -> None:
                store_global(row + place.wide() * 4, some)

            if self.even:
                put()
            else:
                when(place < self.count, put)
