"""The warpgroups that multiply keys by queries, and weigh the products where they lie.

Keys are the rows of a product and the heads of some queries its columns, so that a thread has 2 of
64 keys and a quarter of all heads: it adds up its own, and four threads join theirs.
"""

from collections.abc import Sequence

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import load_global, load_shared, store_shared, store_shared_where
from pallas_kernels.device.simt import (
    Value,
    branch,
    f32,
    fma,
    i32,
    i64,
    loop,
    minimum,
    opaque,
    select,
    shuffle_xor,
    twice_relu,
    when,
)
from pallas_kernels.device.sync import Ring, proxy_fence
from pallas_kernels.indexer_logits.block import Block
from pallas_kernels.indexer_logits.schedule import Schedule, Share, Window
from pallas_kernels.indexer_logits.tuning import PRODUCT, PRODUCTS, QUERY_SLOTS, TILE

_K_BYTES = 32  # of a row, that one product multiplies
_CHAINS = 2  # of sums for one query and key, so that one need not wait for the other


class Queries:
    """What a warpgroup knows of its queries: the weights of its heads, windows, where logits go."""

    def __init__(self, block: Block, schedule: Schedule, share: Share, first: int) -> None:
        """Loads them; `first` of the group's queries is this warpgroup's first."""
        shape, tuning, group = block.shape, block.tuning, share.group
        self.exists: list[Value] = []
        self.windows: list[Window] = []
        self.out: Value | None = None
        if not tuning.handed_on:
            row = (group.query + first).wide() * i64(4 * shape.columns)
            self.out = block.array("out") + row
        self.weights: list[list[Value]] = []
        for i in range(first, first + tuning.queries):
            query = group.query + minimum(i32(i), group.size - 1)
            self.exists.append(group.size > i)
            self.windows.append(schedule.window(query))
            self.weights.append(_weights(block, query))


def _weights(block: Block, query: Value) -> list[Value]:
    """Of one query and this thread's two columns in each eight, 0 for heads that do not exist."""
    heads = block.shape.heads
    line = block.array("weights") + query.wide() * (4 * heads)
    weights = []
    for first in range(0, block.tuning.padded_heads, 8):
        head = block.thread.column * 2 + first
        if heads % 2 == 0:
            pair = load_global(line + minimum(head, heads - 2).wide() * 4, "ff")
        else:
            pair = [
                load_global(line + minimum(head + e, heads - 1).wide() * 4, "f")[0]
                for e in range(2)
            ]
        weights += [select(head + e < heads, pair[e], f32(0.0)) for e in range(2)]
    return weights


def scorer(block: Block, number: int) -> None:
    """Gives the logits of one set of queries for every tile, or for every other one."""
    tuning, schedule = block.tuning, Schedule(block)
    turns = tuning.scorers // tuning.sets
    turn, chosen = number // tuning.sets, number % tuning.sets

    def one(share: Share, carry: list[Value]) -> list[Value]:
        lower, upper = share.lower, share.upper
        slot = Ring(QUERY_SLOTS, *carry[3:])

        def begin() -> list[Value]:
            block.query_full.wait(slot.slot, slot.phase)
            proxy_fence()
            queries = Queries(block, schedule, share, chosen * tuning.queries)
            place = block.shared["queries"] + slot.slot * tuning.query_bytes
            place = place + chosen * tuning.columns * wgmma.ROW_BYTES

            def step(tile: Value, index: Value, *stage: Value) -> list[Value]:
                ring = Ring(tuning.stages, *stage)
                when(
                    (index % turns).equals(turn),
                    lambda: _score(block, queries, tile, place, ring, index),
                )
                return [index + 1, *ring.next().values()]

            done = loop(lower, upper, carry[:3], step)
            block.query_empty.arrive_warp(slot.slot, block.thread)
            return [*done, *slot.next().values()]

        return branch(upper > lower, carry, begin)

    stages = Ring.start(tuning.stages).values()
    schedule.for_each([i32(0), *stages, *Ring.start(QUERY_SLOTS).values()], one)


def _score(
    block: Block, queries: Queries, tile: Value, place: Value, ring: Ring, index: Value
) -> None:
    """The logits of a tile, whose stage is free afterwards.

    Args:
        block: this one.
        queries: of the warpgroup.
        tile: its number in the request.
        place: of the queries' heads in shared memory.
        ring: at the stage of the tile.
        index: of the tile among the block's.
    """
    shape, thread = block.shape, block.thread
    block.full.wait(ring.slot, ring.phase)
    proxy_fence()
    keys = block.shared["tiles"] + ring.slot * block.tuning.tile_bytes
    rows = PRODUCT * wgmma.ROW_BYTES
    running = [_product(block, keys + i * rows, place) for i in range(PRODUCTS)]
    # After the sums are joined, a thread has one key: of its two rows by the lower bit of its
    # number in the quad, and of the products by the upper one.
    row = thread.warp * 16 + thread.quad + ((thread.column & 1) << 3)
    row = row + (thread.column >> 1) * PRODUCT
    word = (ring.slot * TILE + row) * 4
    # Half of a sum, which is of twice the products.
    half = f32(0.5)
    if not shape.bf16:
        half = load_shared(block.shared["scales"] + word, "f")[0] * 0.5
    position = tile * TILE + row
    exists = position < shape.columns
    in_cache = exists
    if shape.max_pages is not None:
        (page,) = load_shared(block.shared["pages"] + word, "r")
        in_cache = page.below(shape.keys.pages)
    sums = []
    for i, product in enumerate(running):
        done = wgmma.wait(PRODUCTS - 1 - i, product)
        if i == PRODUCTS - 1:
            block.empty.arrive_warp(ring.slot, thread)
        sums.append(_weighted(done, queries.weights))
    if queries.out is not None:
        line = queries.out + position.wide() * 4
    else:
        slot, phase = block.score_slot(index)
        block.score_empty.wait(slot, phase ^ 1)
        handed = block.shared["scores"] + (slot * TILE + row) * 4
    for query, value in enumerate(_joined(sums, thread.column)):
        window = queries.windows[query]
        seen = (position >= window.start) & (position < window.end) & in_cache
        logit = select(seen, value * half, f32(float("-inf")))
        if shape.first or shape.last:
            forced = position < window.start + shape.first
            forced = forced | (position >= window.end - shape.last)
            within = (position >= window.start) & (position < window.end)
            logit = select(forced & within, f32(float("inf")), logit)
        if queries.out is not None:
            store_shared_where(
                queries.exists[query] & exists,
                line + query * 4 * shape.columns,
                [logit.as_i32()],
                space="global",
            )
        else:
            store_shared(handed, [logit])
    if queries.out is None:
        block.score_full.arrive_warp(slot, thread)


def _product(block: Block, keys: Value, queries: Value) -> list[Value]:
    """Of 64 keys and the heads of some queries, issued, not finished."""
    # Opaque, or the descriptors of all steps would be kept in registers.
    a, b = wgmma.descriptor(opaque(keys)), wgmma.descriptor(opaque(queries))
    shape, tuning = block.shape, block.tuning
    acc = wgmma.begin([f32(0.0)] * (tuning.columns // 2) if shape.bf16 else [])
    for k in range(shape.row_bytes // _K_BYTES):
        half, within = divmod(k * _K_BYTES, wgmma.ROW_BYTES)
        left = a + ((half * TILE * wgmma.ROW_BYTES + within) >> 4)
        right = b + ((half * tuning.query_rows * wgmma.ROW_BYTES + within) >> 4)
        if shape.bf16:
            acc = wgmma.step_from_shared(
                acc, left, right, dtype="bf16", b_is_k_major=True, replace=k == 0
            )
        elif k == 0:
            acc = wgmma.first_e4m3_step(tuning.columns, left, right)
        else:
            acc = wgmma.e4m3_step(acc, left, right)
    wgmma.commit()
    return acc


def _weighted(product: Sequence[Value], weights: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """For each query the sums over this thread's heads, of its upper and of its lower key."""
    sums = []
    for query, own in enumerate(weights):
        first = query * 2 * len(own)
        rows = []
        for row in range(2):
            chains: list[Value | None] = [None] * _CHAINS
            for i, weight in enumerate(own):
                value = twice_relu(product[first + 4 * (i >> 1) + 2 * row + (i & 1)])
                before = chains[i % _CHAINS]
                chains[i % _CHAINS] = (
                    value * weight if before is None else fma(value, weight, before)
                )
            total, *others = [chain for chain in chains if chain is not None]
            for other in others:
                total = total + other
            rows.append(total)
        sums.append(rows)
    return sums


def _joined(sums: Sequence[Sequence[Sequence[Value]]], column: Value) -> list[Value]:
    """For each query the sum over a quad's heads, of the key that this thread has in the end.

    Args:
        sums: of products, queries and rows.
        column: this thread's number in its quad.
    """
    lower, upper = (column & 1).equals(1), (column >> 1).equals(1)
    joined = []
    for of_products in zip(*sums, strict=True):
        rows = [_exchanged(rows[0], rows[1], lower, 1) for rows in of_products]
        joined.append(_exchanged(rows[0], rows[1], upper, 2))
    return joined


def _exchanged(a: Value, b: Value, takes_b: Value, mask: int) -> Value:
    """`b` of two lanes where this one takes it, else their `a`: each gives what it leaves."""
    return select(takes_b, b, a) + shuffle_xor(select(takes_b, a, b), mask)
