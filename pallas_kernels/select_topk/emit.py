"""The result of a row: positions in order, as they are or as slots, then -1."""

from collections.abc import Callable, Sequence

from pallas_kernels.device.memory import load_global, load_shared, store_global, store_shared
from pallas_kernels.device.simt import (
    Value,
    count_bits,
    i32,
    i64,
    loop,
    lowest_bit,
    minimum,
    select,
    when,
)
from pallas_kernels.select_topk.block import Block
from pallas_kernels.select_topk.shape import WORD, PagedSlots, RaggedRows

_INT_MAX = 2**31 - 1


def write_first(block: Block) -> None:
    """Positions 0, 1, ... of a window that is no longer than k."""
    _write(block, block.window.length, lambda place: place)


def write_marked(block: Block) -> None:
    """The k positions whose bits are set, after a barrier."""
    size = block.shape.words(block.threads) // block.threads
    width = next(w for w in (4, 2, 1) if size % w == 0)
    bits = block.shared["bits"] + block.thread * (4 * size)

    def words(i: Value) -> Sequence[Value]:
        return load_shared(bits + i * (4 * width), "r" * width)

    def count(i: Value, total: Value) -> Sequence[Value]:
        for word in words(i):
            total = total + count_bits(word)
        return [total]

    (total,) = loop(0, i32(size // width), [i32(0)], count)
    # The histogram is not needed any more.
    place = block.shared["histogram"] + block.sum_before(total) * 4
    position = block.thread * (size * WORD) - block.window.start

    def put_words(i: Value, place: Value, position: Value) -> Sequence[Value]:
        for word in words(i):

            def put(_: Value, left: Value, place: Value, at: Value = position) -> Sequence[Value]:
                store_shared(place, [at + lowest_bit(left)])
                return [left & (left - 1), place + 4]

            _, place = loop(0, count_bits(word), [word, place], put)
            position = position + WORD
        return [place, position]

    loop(0, i32(size // width), [place, position], put_words)
    block.sync()
    _write(
        block,
        i32(block.shape.k),
        lambda place: load_shared(block.shared["histogram"] + place * 4, "r")[0],
    )


def _write(block: Block, filled: Value, position_at: Callable[[Value], Value]) -> None:
    shape = block.shape
    places = [block.thread + first for first in range(0, shape.k, block.threads)]
    positions = [position_at(minimum(place, shape.k - 1)) for place in places]
    results = _convert(block, positions)
    row = block.arrays["out"] + block.window.row.wide() * i64(4 * shape.k)
    for i, (place, result) in enumerate(zip(places, results, strict=True)):
        value = select(place < filled, result, i32(-1))

        def store(place: Value = place, value: Value = value) -> None:
            store_global(row + place.wide() * 4, [value])

        if (i + 1) * block.threads <= shape.k:
            store()
        else:
            when(place < shape.k, store)


def _convert(block: Block, positions: Sequence[Value]) -> Sequence[Value]:
    """What positions inside the window stand for; of others anything."""
    row = block.window.row
    match block.shape.conversion:
        case RaggedRows():
            (offset,) = load_global(block.arrays["offsets"] + row.wide() * 4, "r")
            return [position + offset for position in positions]
        case PagedSlots() as pages:
            request = row
            if not pages.own_request:
                (request,) = load_global(block.arrays["requests"] + row.wide() * 4, "r")
            known = request.below(pages.requests)
            first = select(known, request, i32(0)).wide() * i64(4 * pages.max_pages)
            table = block.arrays["page_table"] + first
            numbers = [position // pages.page_size for position in positions]
            listed = [known & number.below(pages.max_pages) for number in numbers]
            found = [
                load_global(table + select(there, number, i32(0)).wide() * 4, "r")[0]
                for there, number in zip(listed, numbers, strict=True)
            ]
            end = _INT_MAX // pages.page_size  # of the pages whose slots are int32
            return [
                select(
                    there & page.below(end),
                    page * pages.page_size + (position - number * pages.page_size),
                    i32(-1),
                )
                for there, page, position, number in zip(
                    listed, found, positions, numbers, strict=True
                )
            ]
    return positions
