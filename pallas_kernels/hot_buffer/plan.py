"""The swap of one request: which slot each position gets, what is fetched, the new LRU order."""

from collections.abc import Callable, Sequence
from functools import partial

from pallas_kernels.device.memory import (
    load_global,
    load_shared,
    maximum_shared,
    store_global,
    store_shared,
)
from pallas_kernels.device.scan import sums_before
from pallas_kernels.device.simt import (
    WARP,
    Value,
    bool_to_int,
    count_bits,
    i32,
    loop,
    maximum,
    minimum,
    opaque,
    select,
    sum_of_warp,
    when,
)
from pallas_kernels.hot_buffer.block import FEW, Block, Own
from pallas_kernels.hot_buffer.position_set import PositionSet

CopyRows = Callable[[Value, Value], None]
"""Copies a row of the host to a row of the device, of each lane; a negative one is none."""

_LOW = (1 << 16) - 1  # of two counts that share a word


def plan_request(block: Block, copy: CopyRows | None = None) -> None:
    """The swap of the block's request; an idle one asks for nothing.

    Args:
        block: with arrays for what is to be fetched, unless the block fetches it itself.
        copy: fetches the row of each lane of a warp that has one.
    """
    shape, shared = block.shape, block.shared
    asked, order = block.own(shape.positions), block.own(shape.size)
    # A thread that has many items loads them again: it has no registers to keep them in.
    keep = max(asked.each, order.each) <= FEW
    (length,) = load_global(block.arrays["seq_lens"] + block.request.wide() * 4, "r")
    lru = block.row("lru", shape.size)

    @partial(_recalled, keep)
    def positions_of(piece: Own) -> list[Value]:
        return piece.load(block.row("positions", shape.positions), -1)

    @partial(_recalled, keep)
    def slots_of(piece: Own) -> list[Value]:
        return piece.load(lru, 0, cache="")

    @partial(_recalled, keep)
    def sources_of(piece: Own) -> list[Value]:
        return [_host_row(block, position, length) for position in positions_of(piece)]

    if keep:
        # Under way while the set is cleared.
        _ = slots_of(order), sources_of(asked)
    chosen = PositionSet(
        shared["bits"],
        shared["counts"],
        shape.context,
        shape.set_words(block.threads),
        block.thread,
        block.threads,
    )
    chosen.clear()
    _load_buffer(block)
    block.sync()

    def choose(piece: Own, _: Value) -> Sequence[Value]:
        for position, source in zip(positions_of(piece), sources_of(piece), strict=True):
            chosen.add(position, source > -1)
        return []

    asked.in_pieces([], choose)
    block.sync()
    total, counts = chosen.sizes()
    (before,), _ = sums_before([total], block.thread, block.threads, shared["header"], block.sync)
    chosen.store_counts(before, counts)
    block.sync()

    @partial(_recalled, keep)
    def ranks_of(piece: Own) -> list[Value]:
        return [chosen.rank(position) for position in positions_of(piece)]

    @partial(_recalled, keep)
    def held_of(piece: Own) -> list[Value]:
        return [_held(block, chosen, slot) for slot in slots_of(piece)]

    # By rank: a slot that holds the position, plus one, and its first occurrence, from the end.
    def claim_first(piece: Own, _: Value) -> Sequence[Value]:
        for item, rank in zip(piece.items, ranks_of(piece), strict=True):
            place = shared["first"] + rank * 4
            when(rank > -1, partial(maximum_shared, place, i32(shape.positions) - item))
        return []

    def claim_slots(piece: Own, _: Value) -> Sequence[Value]:
        for slot, rank in zip(slots_of(piece), held_of(piece), strict=True):
            _claim(block, slot, rank)
        return []

    asked.in_pieces([], claim_first)
    order.in_pieces([], claim_slots)
    block.every(
        shape.newest,
        lambda i: _claim(block, i + shape.size, _held(block, chosen, i + shape.size)),
    )
    block.sync()

    def find_misses(piece: Own, nth: Value, misses: Value, apart: Value) -> Sequence[Value]:
        of_piece = zip(piece.items, positions_of(piece), ranks_of(piece), strict=True)
        for i, (item, position, rank) in enumerate(of_piece):
            slot, first = (_of_rank(block, name, rank) for name in ("slot_of", "first"))
            is_first = first.equals(i32(shape.positions) - item)
            misses = misses | _bit(nth + i, (rank > -1) & slot.equals(0) & is_first)
            apart = apart | _bit(nth + i, (rank > -1) & (slot.equals(position + 1) ^ 1))
        return misses, apart

    def find_hits(piece: Own, nth: Value, hits: Value, evictable: Value) -> Sequence[Value]:
        of_piece = zip(piece.items, slots_of(piece), held_of(piece), strict=True)
        for i, (item, slot, rank) in enumerate(of_piece):
            claimed = _of_rank(block, "slot_of", rank)
            hit = piece.exists(item) & (rank > -1) & claimed.equals(slot + 1)
            owned = block.buffer_row(slot) > -1
            hits = hits | _bit(nth + i, hit)
            evictable = evictable | _bit(nth + i, piece.exists(item) & owned & (hit ^ 1))
        return hits, evictable

    misses, apart = asked.in_pieces([i32(0), i32(0)], find_misses)
    hits, evictable = order.in_pieces([i32(0), i32(0)], find_hits)
    # Before the barriers: the order is written in place after them.
    slots = slots_of(order)
    sums = [
        count_bits(low) | (count_bits(high) << 16)
        for low, high in ((hits, evictable), (misses, apart))
    ]
    sums_to, parts = sums_before(sums, block.thread, block.threads, shared["header"], block.sync)
    totals = [sum_of_warp(part) for part in parts]
    num_hits, num_evictable = totals[0] & _LOW, totals[0] >> 16
    num_misses, num_apart = totals[1] & _LOW, totals[1] >> 16
    num_filled = minimum(num_misses, num_evictable)
    # A short request whose tokens are in their own slots is not reordered.
    reordered = (num_apart.equals(0) & (length < shape.size + 1)) ^ 1

    hits_before, evictable_before = sums_to[0] & _LOW, sums_to[0] >> 16
    for i, (item, slot) in enumerate(zip(order.items, slots, strict=True)):
        hit, free = _has_bit(hits, i32(i)), _has_bit(evictable, i32(i))
        place = shared["tokens"] + evictable_before * 4
        when(free, partial(store_shared, place, [slot]))
        unused = item - hits_before - minimum(evictable_before, num_filled)
        filled = i32(shape.size) - num_hits - num_filled + evictable_before
        age = select(free & (evictable_before < num_filled), filled, unused)
        age = select(hit, i32(shape.size) - num_hits + hits_before, age)
        at = lru + age.wide() * 4
        when(order.exists(item) & reordered, partial(store_global, at, [slot]))
        hits_before = hits_before + bool_to_int(hit)
        evictable_before = evictable_before + bool_to_int(free)
    block.sync()

    tokens = block.row("tokens", shape.slots)

    def fill_misses(piece: Own, before: Value, nth: Value) -> Sequence[Value]:
        of_piece = zip(positions_of(piece), sources_of(piece), ranks_of(piece), strict=True)
        for i, (position, source, rank) in enumerate(of_piece):
            miss = _has_bit(misses, before + i)

            def fill(
                position: Value = position,
                source: Value = source,
                rank: Value = rank,
                nth: Value = nth,
            ) -> None:
                (slot,) = load_shared(shared["tokens"] + nth * 4, "r")
                store_shared(shared["slot_of"] + rank * 4, [slot + 1])
                store_global(tokens + slot.wide() * 4, [position])
                if copy is not None:
                    # Nobody else looks at this place, nor at the first occurrences any more.
                    store_shared(shared["tokens"] + nth * 4, [block.buffer_row(slot)])
                    store_shared(shared["first"] + nth * 4, [source])

            when(miss & (nth < num_evictable), fill)
            nth = nth + bool_to_int(miss)
        return [nth]

    asked.in_pieces([sums_to[1] & _LOW], fill_misses)
    block.sync()

    def answer(piece: Own, before: Value) -> Sequence[Value]:
        rows, fetched, targets = [], [], []
        for i, (source, rank) in enumerate(zip(sources_of(piece), ranks_of(piece), strict=True)):
            slot, miss = _of_rank(block, "slot_of", rank), _has_bit(misses, before + i)
            placed = (rank > -1) & (slot > 0)
            row = block.buffer_row(select(placed, slot - 1, i32(0)))
            rows.append(select(placed, row, i32(-1)))
            fetched.append(select(placed & miss, source, i32(-1)))
            targets.append(select(placed & miss, row, i32(-1)))
        piece.store(block.row("rows", shape.positions), rows)
        if copy is None:
            piece.store(block.row("sources", shape.positions), fetched)
            piece.store(block.row("targets", shape.positions), targets)
        return []

    asked.in_pieces([], answer)
    if copy is not None:
        _fetch(block, num_filled, copy)


def _fetch(block: Block, count: Value, copy: CopyRows) -> None:
    """Copies the rows of so many misses, as many by each warp."""
    warps = block.threads // WARP
    warp, lane = block.thread // WARP, block.thread & (WARP - 1)

    def some(nth: Value) -> Sequence[Value]:
        place = nth * block.threads + lane * warps + warp
        exists = place < count
        place = select(exists, place, i32(0)) * 4
        source, target = (
            load_shared(block.shared[name] + place, "r")[0] for name in ("first", "tokens")
        )
        copy(select(exists, source, i32(-1)), target)
        return []

    loop(0, (count + (block.threads - 1)) // block.threads, [], some)


def _recalled(keep: bool, compute: Callable[[Own], list[Value]]) -> Callable[[Own], list[Value]]:
    """What is computed of a piece of the items: once, into registers, or each time again."""
    if not keep:
        return compute
    kept: list[Value] = []

    def recall(piece: Own) -> list[Value]:
        # Of values kept nothing is known: what was computed of them need not be kept, too.
        kept[:] = [opaque(value) for value in kept] or compute(piece)
        return list(kept)

    return recall


def _load_buffer(block: Block) -> None:
    """What the slots hold, where they lie, and tables by rank without entries."""
    shape, shared = block.shape, block.shared
    tokens = block.row("tokens", shape.slots)
    table = block.row("buffer_table", shape.max_buffer_pages)

    def load_token(slot: Value) -> None:
        store_shared(
            shared["tokens"] + slot * 4, load_global(tokens + slot.wide() * 4, "r", cache="")
        )

    def load_base(place: Value) -> None:
        (page,) = load_global(table + place.wide() * 4, "r")
        base = select(page.below(shape.num_buffer_pages), page * shape.page_size, i32(-1))
        store_shared(shared["bases"] + place * 4, [base])

    def clear(rank: Value) -> None:
        for name in ("first", "slot_of"):
            store_shared(shared[name] + rank * 4, [i32(0)])

    block.every(shape.slots, load_token)
    block.every(shape.max_buffer_pages, load_base)
    block.every(shape.positions, clear)


def _host_row(block: Block, position: Value, length: Value) -> Value:
    # The length is not in the address, so that the two loads do not wait for each other.
    return select(position < length, block.host_row(position), i32(-1))


def _held(block: Block, chosen: PositionSet, slot: Value) -> Value:
    """The rank of what a slot of the request holds; -1 if that was not asked for."""
    (token,) = load_shared(block.shared["tokens"] + slot * 4, "r")
    return select(block.buffer_row(slot) > -1, chosen.rank(token), i32(-1))


def _of_rank(block: Block, name: str, rank: Value) -> Value:
    """An entry of a table by rank; anything for -1."""
    return load_shared(block.shared[name] + maximum(rank, 0) * 4, "r")[0]


def _claim(block: Block, slot: Value, rank: Value) -> None:
    # A reserved slot comes before another one, and has the larger number.
    place = block.shared["slot_of"] + rank * 4
    when(rank > -1, lambda: maximum_shared(place, slot + 1))


def _bit(number: Value, condition: Value) -> Value:
    return bool_to_int(condition) << number


def _has_bit(word: Value, number: Value) -> Value:
    return (word & (i32(1) << number)).equals(0) ^ 1
