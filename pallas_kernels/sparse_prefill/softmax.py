"""The softmax over the keys of a task, by the two warpgroups of scores in turn."""

import math
from typing import NamedTuple

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import global_address, load_global, load_shared, store_shared
from pallas_kernels.device.row_formats import pack_bf16
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
    opaque,
    over_quad,
    ptx,
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
from pallas_kernels.sparse_prefill.block import MEMORY, Block
from pallas_kernels.sparse_prefill.gather import ROWS_OF_WARP
from pallas_kernels.sparse_prefill.tuning import HEADS, ROPE_TILE, SHARES, WARPS

BARRIER = 8  # of the first warpgroup; the other has the next
ROWS = 2  # heads of a thread


class State(NamedTuple):
    """What a thread knows of the softmax, for its two heads.

    Attributes:
        reference: the first head's logarithm of base 2 whose weight is 1, as of the last keys.
        reference_1: the second head's.
        total: the sum of the weights of this thread's own keys.
        total_1: the second head's.
        top: the largest of this thread's own logits, as a logarithm of base 2.
        top_1: the second head's.
    """

    reference: Value
    reference_1: Value
    total: Value
    total_1: Value
    top: Value
    top_1: Value

    @classmethod
    def start(cls) -> "State":
        """Before any key."""
        values = [f32(x) for x in (NO_LOGIT, 0.0, -math.inf) for _ in range(ROWS)]
        return cls._make(values)


class Softmax:
    """One warpgroup's part.

    Weights are powers of two of the difference to a reference, which a head raises only when it
    must. Both warpgroups use the same, and decide in the order of the blocks of keys.
    """

    def __init__(self, block: Block, group: int) -> None:
        self.block, self.thread, self.group = block, block.thread, group
        self.row = block.head_row()
        (scale,) = load_global(global_address(block.arrays["sm_scale"]), "f")
        self.scale = scale * math.log2(math.e)

    def weigh(self, logits: list[Value], state: State, *, is_first: Value, theirs: Value) -> State:
        """Stores the weights of a block of keys and adds them to the sums.

        Args:
            logits: without the factor.
            state: before these keys.
            is_first: whether this warpgroup has had none of this task.
            theirs: how many blocks of keys the other warpgroup has had when this is its turn,
                of all tasks.
        """
        block, group = self.block, self.group
        logits = self._masked([x * self.scale for x in logits])
        tops = [wgmma.largest_of_row(logits, r) for r in range(ROWS)]
        block.decided.wait(1 - group, (theirs + 1) & 1)
        before = self._references(is_first)
        over = [tops[r] > before[r] + LARGEST_WEIGHT for r in range(ROWS)]
        raised = any_lane(over[0] | over[1])
        if group == 0:
            raised = raised | is_first
        reference = branch(raised, before, lambda: self._raise(tops, before))
        flag = block.small + self.thread.warp * 4
        when(
            self.thread.lane.equals(0),
            lambda: store_shared(flag, [bool_to_int(raised)], MEMORY.raised + 4 * WARPS * group),
        )
        block.decided.arrive_warp(group, self.thread)

        # All warps have multiplied the rotary values that the weights replace.
        named_barrier(BARRIER + group, WARPGROUP)
        place = block.tile(group) + self.thread.warp * (ROWS * wgmma.PLAIN_MATRIX_BYTES)
        place = place + (opaque(self.thread.lane) << 2)
        p: list[Value] = []
        size = len(logits) // SHARES
        for share in range(SHARES):
            own = range(share * size, (share + 1) * size)
            p += [exp2(logits[i] - reference[wgmma.row_of(i)]) for i in own]
            for i in own[::2]:
                offset = wgmma.row_of(i) * wgmma.PLAIN_MATRIX_BYTES
                offset += (i >> 2) * wgmma.PLAIN_COLUMN_BYTES
                store_shared(place, [pack_bf16(p[i], p[i + 1])], ROPE_TILE + offset)
            proxy_fence()
            block.weighted.arrive_warp(group * SHARES + share, self.thread)
        earlier = [state.reference, state.reference_1]
        totals = [
            total * exp2(earlier[r] - reference[r])
            for r, total in enumerate((state.total, state.total_1))
        ]
        for i, x in enumerate(p):
            totals[wgmma.row_of(i)] = totals[wgmma.row_of(i)] + x
        largest = [fmax(state.top, tops[0]), fmax(state.top_1, tops[1])]
        return State._make([*reference, *totals, *largest])

    def _masked(self, logits: list[Value]) -> list[Value]:
        """The logits, -inf where a key is masked."""
        offset = MEMORY.masked + 4 * WARPS * self.group
        words = load_shared(self.block.small, "rrrr", offset)
        halves = [words[2 * i] | words[2 * i + 1] << ROWS_OF_WARP for i in range(2)]

        def mask() -> list[Value]:
            own = [half >> (self.thread.column << 1) for half in halves]
            kept = []
            for i, x in enumerate(logits):
                word, bit = divmod(8 * (i >> 2) + (i & 1), 2 * ROWS_OF_WARP)
                kept.append(select((own[word] & (1 << bit)).equals(0), x, f32(-math.inf)))
            return kept

        return branch(i32(0).below(halves[0] | halves[1]), logits, mask)

    def _references(self, is_first: Value) -> list[Value]:
        """As the block of keys before this one left them."""

        def load() -> list[Value]:
            place = self.block.small + opaque(self.row) * 4
            return [load_shared(place, "f", MEMORY.reference + 32 * r)[0] for r in range(ROWS)]

        if self.group:
            return load()
        nothing = [f32(NO_LOGIT)] * ROWS
        return branch(bool_to_int(is_first).equals(0), nothing, load)

    def _raise(self, tops: list[Value], before: list[Value]) -> list[Value]:
        """The references, raised where a weight passes the largest."""
        place = self.block.small + opaque(self.row) * 4
        # All lanes have read what is replaced.
        ptx("bar.warp.sync -1;", convergent=True)
        references = []
        for r, old in enumerate(before):
            top = over_quad(tops[r], fmax)
            new = select(top > old + LARGEST_WEIGHT, top - RAISED_WEIGHT, old)
            references.append(new)

            def store(old: Value = old, new: Value = new, r: int = r) -> None:
                decay = MEMORY.decay + 4 * HEADS * self.group
                store_shared(place, [exp2(old - new)], decay + 32 * r)
                store_shared(place, [new], MEMORY.reference + 32 * r)

            when(self.thread.column.equals(0), store)
        return references

    def finish(self, task: Task, state: State, turn: Ring) -> None:
        """Stores the results of every head but its output, and the factor on that.

        The second warpgroup hands what it knows to the first.
        """
        block, writes = self.block, self.thread.column.equals(0)
        heads = [self.row + 8 * r for r in range(ROWS)]
        known = [
            [reference, over_quad(total, lambda a, b: a + b), over_quad(top, fmax)]
            for reference, total, top in (state[::ROWS], state[1::ROWS])
        ]
        places = [block.small + head * 4 for head in heads]
        if self.group:
            block.partial_empty.wait(0, turn.phase ^ 1)
            for place, three in zip(places, known, strict=True):

                def store(place: Value = place, three: list[Value] = three) -> None:
                    for i, x in enumerate(three):
                        store_shared(place, [x], MEMORY.partial + 4 * HEADS * i)

                when(writes, store)
            block.partial_full.arrive_warp(0, self.thread)
            return
        block.partial_full.wait(0, turn.phase)
        theirs = [
            [load_shared(place, "f", MEMORY.partial + 4 * HEADS * i)[0] for i in range(3)]
            for place in places
        ]
        block.partial_empty.arrive_warp(0, self.thread)
        block.result_empty.wait(0, turn.phase ^ 1)
        for place, head, mine, other in zip(places, heads, known, theirs, strict=True):
            reference = fmax(mine[0], other[0])
            total = mine[1] * exp2(mine[0] - reference)
            total = fma(other[1], exp2(other[0] - reference), total)
            top = fmax(mine[2], other[2])
            factor = finish_head(task, head, reference, total, top, writes)

            def store_factor(place: Value = place, factor: Value = factor) -> None:
                store_shared(place, [factor], MEMORY.factor)

            when(writes, store_factor)
        block.result_full.arrive_warp(0, self.thread)
