"""The swap of one request: which slot each position gets, what is fetched, the new LRU order."""

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
    Value,
    bool_to_int,
    count_bits,
    i32,
    maximum,
    minimum,
    opaque,
    select,
    sum_of_warp,
    when,
)
from pallas_kernels.hot_buffer.block import Block
from pallas_kernels.hot_buffer.position_set import PositionSet

_LOW = (1 << 16) - 1  # of two counts that share a word
_FEW = 4  # items of a thread


def plan_request(block: Block) -> None:
    """The swap of the block's request; an idle one asks for nothing."""
    shape, shared = block.shape, block.shared
    asked, order = block.own(shape.positions), block.own(shape.size)
    # A thread that has many items loads some again: there are no registers to keep them in.
    crowded = max(asked.each, order.each) > _FEW
    (length,) = load_global(block.arrays["seq_lens"] + block.request.wide() * 4, "r")
    positions = asked.load(block.row("positions", shape.positions), -1)
    lru = block.row("lru", shape.size)
    slots = order.load(lru, 0, cache="") if not crowded else []
    sources = [_host_row(block, position, length) for position in positions]

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
    for position, source in zip(positions, sources, strict=True):
        chosen.add(position, source > -1)
    block.sync()
    total, counts = chosen.sizes()
    (before,), _ = sums_before([total], block.thread, block.threads, shared["header"], block.sync)
    chosen.store_counts(before, counts)
    block.sync()

    positions = _fresh(positions)
    # By rank: a slot that holds the position, plus one, and its first occurrence, from the end.
    ranks = [
        select(source > -1, chosen.rank(position), i32(-1))
        for position, source in zip(positions, sources, strict=True)
    ]
    for item, rank in zip(asked.items, ranks, strict=True):
        place = shared["first"] + rank * 4
        when(rank > -1, partial(maximum_shared, place, i32(shape.positions) - item))
    if crowded:
        slots = order.load(lru, 0, cache="")
    held = [_held(block, chosen, slot) for slot in slots]
    for slot, rank in zip(slots, held, strict=True):
        _claim(block, slot, rank)
    block.every(
        shape.newest,
        lambda i: _claim(block, i + shape.size, _held(block, chosen, i + shape.size)),
    )
    block.sync()

    ranks, slots, held = _fresh(ranks), _fresh(slots), _fresh(held)
    if crowded:
        positions = asked.load(block.row("positions", shape.positions), -1)
    misses, apart = i32(0), i32(0)
    for i, (item, position, rank) in enumerate(zip(asked.items, positions, ranks, strict=True)):
        slot, first = (_of_rank(block, name, rank) for name in ("slot_of", "first"))
        is_first = first.equals(i32(shape.positions) - item)
        misses = misses | (bool_to_int((rank > -1) & slot.equals(0) & is_first) << i)
        apart = apart | (bool_to_int((rank > -1) & (slot.equals(position + 1) ^ 1)) << i)
    hits, evictable = i32(0), i32(0)
    for i, (item, slot, rank) in enumerate(zip(order.items, slots, held, strict=True)):
        claimed = _of_rank(block, "slot_of", rank)
        hit = order.exists(item) & (rank > -1) & claimed.equals(slot + 1)
        owned = block.buffer_row(slot) > -1
        hits = hits | (bool_to_int(hit) << i)
        evictable = evictable | (bool_to_int(order.exists(item) & owned & (hit ^ 1)) << i)
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

    ranks, slots = _fresh(ranks), _fresh(slots)
    hits_before, evictable_before = sums_to[0] & _LOW, sums_to[0] >> 16
    for i, (item, slot) in enumerate(zip(order.items, slots, strict=True)):
        hit, free = _bit(hits, i), _bit(evictable, i)
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

    if crowded:
        positions = asked.load(block.row("positions", shape.positions), -1)
    tokens = block.row("tokens", shape.slots)
    nth = sums_to[1] & _LOW
    for i, (position, rank) in enumerate(zip(positions, ranks, strict=True)):
        miss = _bit(misses, i)

        def fill(position: Value = position, rank: Value = rank, nth: Value = nth) -> None:
            (slot,) = load_shared(shared["tokens"] + nth * 4, "r")
            store_shared(shared["slot_of"] + rank * 4, [slot + 1])
            store_global(tokens + slot.wide() * 4, [position])

        when(miss & (nth < num_evictable), fill)
        nth = nth + bool_to_int(miss)
    block.sync()

    ranks = _fresh(ranks)
    if crowded:
        positions = asked.load(block.row("positions", shape.positions), -1)
        sources = [_host_row(block, position, length) for position in positions]
    rows, fetched, targets = [], [], []
    for i, (source, rank) in enumerate(zip(sources, ranks, strict=True)):
        slot, miss = _of_rank(block, "slot_of", rank), _bit(misses, i)
        placed = (rank > -1) & (slot > 0)
        row = block.buffer_row(select(placed, slot - 1, i32(0)))
        rows.append(select(placed, row, i32(-1)))
        fetched.append(select(placed & miss, source, i32(-1)))
        targets.append(select(placed & miss, row, i32(-1)))
    for array, words in (("rows", rows), ("sources", fetched), ("targets", targets)):
        asked.store(block.row(array, shape.positions), words)


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


def _fresh(values: list[Value]) -> list[Value]:
    """The same values, of which nothing is known: what was computed of them need not be kept."""
    return [opaque(value) for value in values]


def _bit(word: Value, number: int) -> Value:
    return (word & (1 << number)).equals(0) ^ 1
