"""The keys of dense decode: the positions of a request, in the pages that its table names."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from pallas_kernels.device.memory import (
    global_address,
    load_global,
    load_shared,
    store_shared,
)
from pallas_kernels.device.row_formats import TILE
from pallas_kernels.device.simt import (
    Value,
    block_thread,
    bool_to_int,
    branch,
    f32,
    floor_divide,
    i32,
    loop,
    maximum,
    minimum,
    select,
    when,
)
from pallas_kernels.sparse_decode.task import Task
from pallas_kernels.sparse_decode.tuning import SLOTS, Shape

MOST_ORDERED = 512  # requests, one for each thread
LENGTHS = 8  # that are read together


@dataclasses.dataclass(frozen=True)
class DenseShape(Shape):
    """One launch of dense decode: a query is a request, its heads are those of all its tokens.

    Attributes:
        tokens: of a request, at its last positions.
        causal: whether a token attends to positions up to its own alone.
        window: of these a token attends to the last so many, or None. Tokens of one request then
            attend to the same ones: `causal` is for one token.
        page_size: positions of a page.
    """

    tokens: int
    causal: bool
    window: int | None
    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self.num_slots // self.page_size

    @property
    def max_pages(self) -> int:
        """Entries of a request's table."""
        return self.topk // self.page_size


class PagedKeys:
    """Every position of a request, up to its length and to that of each token.

    Parts of the keys are equal parts of a request's own length, so that results depend on nothing
    but the request.
    """

    def __init__(self, task: Task) -> None:
        assert isinstance(task.shape, DenseShape)
        self.task, self.shape = task, task.shape
        self.neighbours = math.gcd(self.shape.page_size, TILE)
        self.heads = self.shape.heads // self.shape.tokens

    @property
    def ordered(self) -> bool:
        """Whether the longest requests come first, for blocks that end last to be short ones."""
        shape = self.shape
        blocks = shape.n * math.ceil(shape.heads / self.task.heads) * shape.splits
        return 1 < shape.n <= MOST_ORDERED and blocks > SLOTS

    def place_row(self, place: Value) -> None:
        """Of requests in the order of their lengths, the one whose turn it is."""
        if not self.ordered:
            return
        n, thread = self.shape.n, block_thread()
        address = global_address(self.task.arrays["seq_lens"])

        def length(number: Value) -> Value:
            return load_global(address + minimum(number, n - 1).wide() * 4, "r")[0]

        own = length(thread)

        def count(step: Value, longer: Value) -> list[Value]:
            numbers = [step * LENGTHS + i for i in range(LENGTHS)]
            for number, other in zip(numbers, [length(each) for each in numbers], strict=True):
                before = (other > own) | (other.equals(own) & (number < thread))
                longer = longer + bool_to_int(before & (number < n))
            return [longer]

        (rank,) = loop(0, i32(math.ceil(n / LENGTHS)), [i32(0)], count)
        mine = (thread < n) & rank.equals(self.task.row)
        when(mine, lambda: store_shared(place, [thread]))

    def take_row(self, place: Value) -> None:
        """The request whose turn it is."""
        if self.ordered:
            (self.task.row,) = load_shared(place, "r")

    def length(self) -> Value:
        """How many positions the last of the block's tokens attends to."""
        return self._reach(minimum(self.task.first_head + self.task.heads, self.shape.heads) - 1)

    def blocks(self, length: Value) -> tuple[Value, Value]:
        """A part of the request's length, up to that of the block's tokens."""
        used = floor_divide(minimum(self._context(), self.shape.topk) + (TILE - 1), TILE)
        unused = None
        if self.shape.window is not None:
            unused = floor_divide(self._start(), TILE)
            used = maximum(used - unused, 0)
        per_split = (used + (self.shape.splits - 1)) // self.shape.splits
        first = self.task.split * per_split
        if unused is not None:
            first = first + unused
        own = floor_divide(length + (TILE - 1), TILE)
        return first, minimum(first + per_split, own)

    def slots(self) -> Callable[[Value, Value], Value]:
        """A page that is not one of the cache is masked."""
        shape = self.shape
        table = global_address(self.task.arrays["page_table"])
        table = table + self.task.row.wide() * (4 * shape.max_pages)

        start = None if shape.window is None else self._start()

        def slot_at(place: Value, end: Value) -> Value:
            entry = minimum(place // shape.page_size, shape.max_pages - 1)
            (page,) = load_global(table + entry.wide() * 4, "r")
            exists = (place < end) & page.below(shape.num_pages)
            if start is not None:
                exists = exists & (place >= start)
            return select(exists, page * shape.page_size + place % shape.page_size, i32(-1))

        return slot_at

    def limiter(
        self, head: Callable[[int], Value], key: Callable[[int], Value]
    ) -> Callable[[Value, Sequence[Value]], list[Value]]:
        """Masks what is beyond a token's own position, where tokens of a block differ."""
        if not self.shape.causal or self.heads % self.task.heads == 0:
            return lambda number, logits: list(logits)
        first_head = self.task.first_head
        reach = self._reach(first_head)
        before = first_head % self.heads  # heads of the first token that the block does not have

        def limit(number: Value, logits: Sequence[Value]) -> list[Value]:
            begin = number * TILE

            def limited() -> list[Value]:
                left = reach - begin
                return [
                    select(key(i) < left + (before + head(i)) // self.heads, x, f32(-math.inf))
                    for i, x in enumerate(logits)
                ]

            return branch(reach < begin + TILE, list(logits), limited)

        return limit

    def _context(self) -> Value:
        """The request's length."""
        address = global_address(self.task.arrays["seq_lens"]) + self.task.row.wide() * 4
        return maximum(load_global(address, "r")[0], 0)

    def _start(self) -> Value:
        """The first position of the window, if there is one."""
        return maximum(self._context() - (self.shape.window or 0), 0)

    def _reach(self, head: Value) -> Value:
        """How many positions the token of a head attends to; less than 0 for none."""
        context, shape = self._context(), self.shape
        if shape.causal and shape.tokens > 1:
            context = context - (shape.tokens - 1) + head // self.heads
        return minimum(context, shape.topk)
