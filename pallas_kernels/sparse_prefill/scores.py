"""The warpgroup of the logits and their softmax."""

import math

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import (
    global_address,
    load_global,
    load_shared,
    store_shared,
)
from pallas_kernels.device.row_formats import pack_bf16
from pallas_kernels.device.simt import (
    WARPGROUP,
    Value,
    any_lane,
    bool_to_int,
    branch,
    exp2,
    f32,
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
from pallas_kernels.sparse_decode.task import Task
from pallas_kernels.sparse_prefill.block import Block
from pallas_kernels.sparse_prefill.gather import ROW_BYTES
from pallas_kernels.sparse_prefill.tuning import HEAD_TILE, HEADS, PARTS, WARPS

BARRIER = 8
ROWS = 2  # heads of a thread


def scores(block: Block) -> None:
    """Writes the weights P of all keys, then max_logits, the LSE and the outputs' factors."""
    softmax = _Softmax(block)

    def one(index: Value, carry: list[Value]) -> list[Value]:
        task, turn = block.task(index), Ring(1, *carry[2:])
        count = block.stages_of(task)
        held = _held_query(block, task)
        block.query_full.wait(0, turn.phase)
        state = [f32(NO_LOGIT)] * ROWS + [f32(0.0)] * ROWS + [f32(-math.inf)] * ROWS
        start = [*state, *carry[:2]]
        walk = _walk_ahead if block.tuning.ahead else _walk
        done = branch(count > 0, start, lambda: walk(block, softmax, held, count, start))
        when(count.equals(0), lambda: block.query_empty.arrive_warp(0, block.thread))
        block.result_empty.wait(0, turn.phase ^ 1)
        softmax.finish(task, done[: 3 * ROWS])
        block.result_full.arrive_warp(0, block.thread)
        return [*done[3 * ROWS :], *turn.next().values()]

    block.for_each_task([*Ring.start(block.tuning.stages).values(), *Ring.start(1).values()], one)


def _walk_ahead(
    block: Block, softmax: "_Softmax", held: list[list[Value]], count: Value, start: list[Value]
) -> list[Value]:
    """All stages of a task: Q K^T of each is issued before the softmax of the one before."""
    size = block.tuning.keys // 2
    ring = Ring(block.tuning.stages, *start[3 * ROWS :])
    logits = wgmma.wait(0, _products(block, held, ring))

    def step(_: Value, *carry: Value) -> list[Value]:
        logits, state = list(carry[:size]), list(carry[size : size + 3 * ROWS])
        ring = Ring(block.tuning.stages, *carry[size + 3 * ROWS :])
        following = _products(block, held, ring.next())
        state = softmax.weigh(logits, ring, state)
        return [*wgmma.wait(0, following), *state, *ring.next().values()]

    carry = loop(1, count, [*logits, *start], step)
    block.query_empty.arrive_warp(0, block.thread)
    ring = Ring(block.tuning.stages, *carry[size + 3 * ROWS :])
    state = softmax.weigh(list(carry[:size]), ring, list(carry[size : size + 3 * ROWS]))
    return [*state, *ring.next().values()]


def _walk(
    block: Block, softmax: "_Softmax", held: list[list[Value]], count: Value, start: list[Value]
) -> list[Value]:
    def step(_: Value, *carry: Value) -> list[Value]:
        state, ring = list(carry[: 3 * ROWS]), Ring(block.tuning.stages, *carry[3 * ROWS :])
        logits = wgmma.wait(0, _products(block, held, ring))
        return [*softmax.weigh(logits, ring, state), *ring.next().values()]

    carry = loop(0, count - 1, start, step)
    ring = Ring(block.tuning.stages, *carry[3 * ROWS :])
    logits = wgmma.wait(0, _products(block, held, ring))
    block.query_empty.arrive_warp(0, block.thread)
    return [*softmax.weigh(logits, ring, list(carry[: 3 * ROWS])), *ring.next().values()]


def _held_query(block: Block, task: Task) -> list[list[Value]]:
    """Fragments of the first columns of the query, from where it is stored."""
    heads = block.shape.heads
    fragments: list[list[Value]] = [[] for _ in range(4 * block.tuning.held)]
    for chunk in range(8 * block.tuning.held):
        for r in range(ROWS):
            head = task.first_head + block.head_row() + 8 * r
            exists = head < heads
            row = task.row.wide() * heads + select(exists, head, i32(0)).wide()
            source = global_address(block.arrays["q"]) + row * ROW_BYTES
            source = source + (block.thread.column * 4).wide()
            (word,) = load_global(source, "r", 16 * chunk)
            fragments[chunk // 2].append(select(exists, word, i32(0)))
    return fragments


def _products(block: Block, held: list[list[Value]], ring: Ring) -> list[Value]:
    """Q K^T of a stage, issued, not finished."""
    tuning = block.tuning
    block.full.wait(ring.slot, ring.phase)
    if tuning.fence:
        proxy_fence()
    # Opaque, or the descriptors of all steps would be kept in registers.
    a = wgmma.descriptor(opaque(block.query))
    b = wgmma.descriptor(block.tile(ring.slot))
    acc = wgmma.begin([f32(0.0)] * (tuning.keys // 2))
    for step in range(4 * (PARTS + 1)):
        part, k = divmod(step, 4)
        keys = b + ((part * tuning.column_tile + 32 * k) >> 4)
        if part < tuning.held:
            acc = wgmma.step(acc, held[step], keys, dtype="bf16", b_is_k_major=True)
        else:
            heads = a + (((part - tuning.held) * HEAD_TILE + 32 * k) >> 4)
            acc = wgmma.step_from_shared(acc, heads, keys, dtype="bf16", b_is_k_major=True)
    wgmma.commit()
    return acc


class _Softmax:
    """The softmax over the keys of a task, for two heads of each thread.

    Weights are powers of two of the difference to a reference, which a head raises only when it
    must. A thread's state is two references, the sums of its own keys' weights, and its own keys'
    largest logits.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.thread = block, block.thread
        self.row = block.head_row()
        (scale,) = load_global(global_address(block.arrays["sm_scale"]), "f")
        self.scale = scale * math.log2(math.e)

    def weigh(self, logits: list[Value], ring: Ring, state: list[Value]) -> list[Value]:
        """Stores the weights of a stage and adds them to the sums."""
        block, tuning, slot = self.block, self.block.tuning, ring.slot
        logits = self._masked([x * self.scale for x in logits], slot)
        tops = [self._top(logits, r) for r in range(ROWS)]
        over = [tops[r] > state[r] + LARGEST_WEIGHT for r in range(ROWS)]
        raised = any_lane(over[0] | over[1])
        largest = [fmax(state[2 * ROWS + r], tops[r]) for r in range(ROWS)]
        state = branch(raised, state[: 2 * ROWS], lambda: self._raise(tops, slot, state))
        flag = block.small + (slot * WARPS + self.thread.warp) * 4
        when(
            self.thread.lane.equals(0),
            lambda: store_shared(flag, [bool_to_int(raised)], block.memory.raised),
        )
        block.decided.arrive_warp(slot, self.thread)

        p = [exp2(x - state[_row(i)]) for i, x in enumerate(logits)]
        # All warps have multiplied the rotary values that the weights replace.
        named_barrier(BARRIER, WARPGROUP)
        place = block.tile(slot) + tuning.rope_tile + self.thread.warp * 256
        place = place + (opaque(self.thread.lane) << 2)
        for v in range(tuning.keys // 8):
            for r in range(ROWS):
                i = 4 * v + 2 * r
                offset = v * wgmma.PLAIN_COLUMN_BYTES + r * wgmma.PLAIN_MATRIX_BYTES
                store_shared(place, [pack_bf16(p[i], p[i + 1])], offset)
        proxy_fence()
        block.weighted.arrive_warp(slot, self.thread)
        sums = state[ROWS:]
        for i, x in enumerate(p):
            sums[_row(i)] = sums[_row(i)] + x
        return [*state[:ROWS], *sums, *largest]

    def _masked(self, logits: list[Value], slot: Value) -> list[Value]:
        """The logits, -inf where a key is masked."""
        block, rows = self.block, self.block.tuning.rows_of_warp
        words = load_shared(block.small + slot * (4 * WARPS), "rrrr", block.memory.masked)
        halves = [words[2 * i] | words[2 * i + 1] << rows for i in range(2)]

        def mask() -> list[Value]:
            own = [half >> (self.thread.column << 1) for half in halves]
            kept = []
            for i, x in enumerate(logits):
                key = 8 * (i >> 2) + (i & 1)
                word, bit = divmod(key, 2 * rows)
                kept.append(select((own[word] & (1 << bit)).equals(0), x, f32(-math.inf)))
            return kept

        return branch(i32(0).below(halves[0] | halves[1]), logits, mask)

    def _top(self, logits: list[Value], row: int) -> Value:
        """The largest of this thread's logits of one of its heads."""
        mine = [x for i, x in enumerate(logits) if _row(i) == row]
        while len(mine) > 1:
            pairs = zip(mine[::2], mine[1::2], strict=False)
            mine = [fmax(a, b) for a, b in pairs] + mine[len(mine) & ~1 :]
        return mine[0]

    def _raise(self, tops: list[Value], slot: Value, state: list[Value]) -> list[Value]:
        """Raises the reference where a weight passes the largest; references and sums then."""
        block = self.block
        place = block.small + (slot * (4 * HEADS) + opaque(self.row) * 4)
        new, sums = [], []
        for r in range(ROWS):
            top = over_quad(tops[r], fmax)
            old = state[r]
            new.append(select(top > old + LARGEST_WEIGHT, top - RAISED_WEIGHT, old))
            decay = exp2(old - new[r])
            sums.append(state[ROWS + r] * decay)

            def store(decay: Value = decay, r: int = r) -> None:
                store_shared(place, [decay], block.memory.decay + 32 * r)

            when(self.thread.column.equals(0), store)
        return [*new, *sums]

    def finish(self, task: Task, state: list[Value]) -> None:
        """Stores max_logits and the LSE of every head, and the factor on its output."""
        block, writes = self.block, self.thread.column.equals(0)
        for r in range(ROWS):
            head = self.row + 8 * r
            total = over_quad(state[ROWS + r], lambda a, b: a + b)
            top = over_quad(state[2 * ROWS + r], fmax)
            factor = finish_head(task, head, state[r], total, top, writes)
            place = block.small + head * 4

            def store(place: Value = place, factor: Value = factor) -> None:
                store_shared(place, [factor], block.memory.factor)

            when(writes, store)


def _row(i: int) -> int:
    """Which of its two heads an element of a thread's products belongs to."""
    return (i >> 1) & 1
