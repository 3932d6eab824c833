"""The warpgroup of the logits and their softmax."""

import math
from collections.abc import Callable

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import load_shared, store_shared
from pallas_kernels.device.row_formats import TILE, pack_bf16, pack_f16
from pallas_kernels.device.simt import (
    WARPGROUP,
    Value,
    any_lane,
    bool_to_int,
    branch,
    exp2,
    f32,
    fma,
    fmax,
    i32,
    loop,
    opaque,
    over_quad,
    select,
    when,
)
from pallas_kernels.device.sync import Ring, named_barrier, proxy_fence
from pallas_kernels.sparse_decode.heads import (
    LARGEST_WEIGHT,
    NO_LOGIT,
    RAISED_WEIGHT,
    finish_head,
)
from pallas_kernels.sparse_decode.wide.block import (
    COLUMN_TILE,
    MEMORY,
    PARTS,
    SHARES,
    STAGES,
    WARPS,
    Block,
    held_tiles,
    is_converted,
)
from pallas_kernels.sparse_decode.wide.queries import load_query

BARRIER = 8
SIZE = 32  # logits of a thread: 2 heads by 16 keys
ROWS = 2
PAIRS = 8  # of neighbouring keys


def scores(block: Block) -> None:
    """Writes the weights P of every block of keys, then the LSE and the outputs' factors."""
    load_query(block, 0)
    block.meet()
    first, last = block.key_blocks(block.length())
    block.query_ready.wait(0, i32(0))
    softmax = _Softmax(block)
    held = _held_query(block)

    def step(number: Value, *carry: Value) -> list[Value]:
        state, ring = list(carry[:-2]), Ring(STAGES, *carry[-2:])
        block.wait_for_rows(ring)
        products = _products(block, held, ring.slot)
        tokens = softmax.tokens(ring.slot)
        logits = wgmma.wait(0, products)
        return [*softmax.weigh(logits, tokens, number, ring, state), *ring.next().values()]

    state = [f32(NO_LOGIT)] * ROWS + [f32(0.0)] * ROWS
    if block.shape.has_max_logits:
        state += [f32(-math.inf)] * ROWS
    carry = loop(first, last, [*state, *Ring.start(STAGES).values()], step)
    softmax.finish(list(carry[:-2]))
    block.factor_ready.arrive_warp(0, block.thread)


def _held_query(block: Block) -> list[list[Value]]:
    """Fragments of the first columns of the query, which then are free in shared memory."""
    thread, fragments = block.thread, []
    row = block.query_tile(i32(0)) + block.head_row() * wgmma.ROW_BYTES + thread.column * 4
    for part in range(held_tiles(block.format)):
        for k in range(4):
            fragment = []
            for chunk in (2 * k, 2 * k + 1):
                place = row + ((thread.quad ^ chunk) << 4)
                for r in range(ROWS):
                    offset = part * COLUMN_TILE + r * wgmma.ATOM_BYTES
                    fragment += load_shared(place, "r", offset)
            fragments.append(fragment)
    block.release(block.query_taken, 0)
    return fragments


def _products(block: Block, held: list[list[Value]], slot: Value) -> list[Value]:
    """Q K^T of a block of keys, issued, not finished."""
    tiles = held_tiles(block.format)
    a = wgmma.descriptor(opaque(block.query))
    b = wgmma.descriptor(block.tile(slot))
    acc = wgmma.begin([f32(0.0)] * SIZE)
    for part in range(PARTS + 1):
        dtype = block.format.rope_dtype if part == PARTS else block.format.dtype
        for k in range(4):
            keys = b + ((part * COLUMN_TILE + 32 * k) >> 4)
            if part < tiles:
                heads = held[4 * part + k]
                acc = wgmma.step(acc, heads, keys, dtype=dtype, b_is_k_major=True)
            else:
                at = a + (((part - tiles) * COLUMN_TILE + 32 * k) >> 4)
                acc = wgmma.step_from_shared(acc, at, keys, dtype=dtype, b_is_k_major=True)
    wgmma.commit()
    return acc


class _Softmax:
    """The softmax over the keys of this block, for two heads of each thread.

    Weights are powers of two of the difference to a reference, which a head raises only when it
    must. A thread's state is two references, the sums of its own keys' weights and, if they are
    asked for, the largest of its own keys' logits.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.thread = block, block.thread
        self.row = block.head_row()
        place = block.small + self.row * 4
        self.scale = [load_shared(place, "f", MEMORY.decay + 32 * r)[0] for r in range(ROWS)]
        self.limit = block.keys.limiter(self._head, self._key)

    def tokens(self, slot: Value) -> Callable[[int], list[Value]]:
        """Pairs of what is kept beside the rows of this thread's keys.

        They are loaded here, beside the products, where there are registers for it: the compiler
        does not move a load before the stores of the weights.
        """
        keys = self.block.small + slot * (4 * TILE) + opaque(self.thread.column) * 8

        def load(pair: int) -> list[Value]:
            return load_shared(keys, "rr", MEMORY.tokens + 32 * pair)

        late = is_converted(self.block.format) and not self.block.paired
        if late or self.block.shape.has_max_logits:
            return load
        return [load(pair) for pair in range(PAIRS)].__getitem__

    def weigh(
        self,
        logits: list[Value],
        tokens: Callable[[int], list[Value]],
        number: Value,
        ring: Ring,
        state: list[Value],
    ) -> list[Value]:
        """Stores the weights of a block of keys and adds them to the sums."""
        block, row_format, slot = self.block, self.block.format, ring.slot
        state, largest = state[: 2 * ROWS], state[2 * ROWS :]
        for v in range(PAIRS):
            words = tokens(v)
            bias = [(word << 16).as_f32() for word in words]
            four = logits[4 * v : 4 * v + 4]
            if row_format.block_scales:
                # 2^e of a key whose weight is 2^-e; finite, too, where a mask made the weight 0.
                up = [(i32(254 << 23) - (word & -65536)).as_f32() for word in words]
                four = [x * up[i & 1] for i, x in enumerate(four)]
            weighed = [fma(x, self.scale[wgmma.row_of(i)], bias[i & 1]) for i, x in enumerate(four)]
            logits[4 * v : 4 * v + 4] = weighed
            if largest:
                if row_format.block_scales:
                    masks = [select(b.equals(-math.inf), b, f32(0.0)) for b in bias]
                    weighed = [
                        fma(x, self.scale[wgmma.row_of(i)], masks[i & 1])
                        for i, x in enumerate(four)
                    ]
                for i, x in enumerate(weighed):
                    largest[wgmma.row_of(i)] = fmax(largest[wgmma.row_of(i)], x)
        logits = self.limit(number, logits)
        tops = [wgmma.largest_of_row(logits, r) for r in range(ROWS)]
        over = [tops[r] > state[r] + LARGEST_WEIGHT for r in range(ROWS)]
        raised = any_lane(over[0] | over[1])
        state = branch(raised, state, lambda: self._raise(tops, ring, state))
        flag = block.small + slot * (4 * WARPS) + self.thread.warp * 4
        when(
            self.thread.lane.equals(0),
            lambda: store_shared(flag, [bool_to_int(raised)], MEMORY.raised),
        )

        if not block.paired:
            # All warps have multiplied the rotary values that the weights replace.
            named_barrier(BARRIER, WARPGROUP)
        pack = pack_f16 if row_format.dtype == "f16" else pack_bf16
        quad = opaque(self.thread.quad)
        row = (self.thread.warp * 16 + quad) * wgmma.ROW_BYTES
        base = block.weights(slot) + row + self.thread.column * 4
        sums = state[ROWS:]
        for v in range(PAIRS):
            p = [exp2(logits[4 * v + i] - state[wgmma.row_of(i)]) for i in range(4)]
            place = base + ((quad ^ v) << 4)
            for r in range(ROWS):
                store_shared(place, [pack(p[2 * r], p[2 * r + 1])], wgmma.ATOM_BYTES * r)
            if row_format.block_scales:
                weight = [(word & -65536).as_f32() for word in tokens(v)]
                for i, x in enumerate(p):
                    sums[wgmma.row_of(i)] = fma(x, weight[i & 1], sums[wgmma.row_of(i)])
            else:
                for i, x in enumerate(p):
                    sums[wgmma.row_of(i)] = sums[wgmma.row_of(i)] + x
            if (v + 1) % (PAIRS // block.shares) == 0:
                proxy_fence()
                share = slot * SHARES + v // (PAIRS // block.shares)
                block.weighted.arrive_warp(share, self.thread)
        return [*state[:ROWS], *sums, *largest]

    def _head(self, i: int) -> Value:
        """Of a logit, its number in the block."""
        return self.row + 8 * wgmma.row_of(i)

    def _key(self, i: int) -> Value:
        """Of a logit, its number in the block of keys."""
        return self.thread.column * 2 + (8 * (i >> 2) + (i & 1))

    def _raise(self, tops: list[Value], ring: Ring, state: list[Value]) -> list[Value]:
        """Raises the reference where a weight passes the largest; the state then."""
        block = self.block
        # The values of the block of keys before this one may not have read its factors yet.
        before = ring.previous()
        block.empty.wait(before.slot, before.phase)
        place = block.small + opaque(self.row) * 4
        new, sums = [], []
        for r in range(ROWS):
            top = over_quad(tops[r], fmax)
            old = state[r]
            new.append(select(top > old + LARGEST_WEIGHT, top - RAISED_WEIGHT, old))
            decay = exp2(old - new[r])
            sums.append(state[ROWS + r] * decay)

            def store(decay: Value = decay, r: int = r) -> None:
                store_shared(place, [decay], MEMORY.decay + 32 * r)

            when(self.thread.column.equals(0), store)
        return [*new, *sums]

    def finish(self, state: list[Value]) -> None:
        """Stores the results of every head but its output, and the factor on that."""
        # In place of what other warps may be reading.
        named_barrier(BARRIER, WARPGROUP)
        for r in range(ROWS):
            total = over_quad(state[ROWS + r], lambda a, b: a + b)
            top = over_quad(state[2 * ROWS + r], fmax) if self.block.shape.has_max_logits else None
            writes, head = self.thread.column.equals(0), self.row + 8 * r
            factor = finish_head(self.block, head, state[r], total, top, writes)
            place = self.block.small + head * 4

            def store(place: Value = place, factor: Value = factor) -> None:
                store_shared(place, [factor], MEMORY.tokens)

            when(writes, store)
