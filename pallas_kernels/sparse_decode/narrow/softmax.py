"""The softmax over a block of keys, and over all of them."""

import math
from collections.abc import Callable

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import (
    load_shared,
    store_shared,
)
from pallas_kernels.device.row_formats import BIAS, pack_bf16, pack_f16
from pallas_kernels.device.simt import (
    WARPGROUP,
    Value,
    branch,
    exp2,
    f32,
    fma,
    fmax,
    i32,
    select,
    shuffle_xor,
    when,
)
from pallas_kernels.device.sync import any_of, named_barrier, proxy_fence
from pallas_kernels.sparse_decode.heads import LARGEST_WEIGHT, RAISED_WEIGHT, finish_head
from pallas_kernels.sparse_decode.narrow.block import Block, head_place

BARRIER = 8
MOST_LARGEST = 8  # that a thread has registers for


class Operands:
    """What the softmax reads besides the logits.

    Attributes:
        bias: of this thread's two rows.
        weight: of the rows, or None.
        scale: of this thread's columns.
        reference: of the columns.
    """

    def __init__(self, softmax: "Softmax", slot: Value) -> None:
        block = softmax.block
        rows = block.tokens + slot * block.token_bytes + softmax.row * 4
        self.bias = [load_shared(rows, "f", BIAS + 32 * r)[0] for r in range(2)]
        self.weight = None
        if block.format.block_scales:
            offset = block.format.weight_offset(block.tuning.rows)
            self.weight = [load_shared(rows, "f", offset + 32 * r)[0] for r in range(2)]
        self.scale = softmax.columns_at(block.memory.scale)
        self.reference = softmax.columns_at(block.memory.reference)


class Softmax:
    """The softmax over the keys of this block, for all of its heads.

    Weights are powers of two of the difference to a reference, which every head raises only when
    it must: the maximum would cost a walk through the warpgroup for each block of keys.

    A lane keeps the sums of `kept` columns over the rows of its warp and, if they are asked for,
    the largest logits of its columns over its own rows. Of 64 columns each half of the warp keeps
    the largest of one half.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.thread = block, block.thread
        self.heads = block.tuning.heads
        self.row = block.row_in_stage()
        self.kept = max(1, self.heads // 32)
        self.columns = self._kept_columns()
        self.limit = block.keys.limiter(self._head, self._key)

    def start(self) -> list[Value]:
        """The state before the first block of keys."""
        asked = self.block.shape.has_max_logits
        largest = min(self.heads // 4, MOST_LARGEST) if asked else 0
        return [f32(0.0)] * self.kept + [f32(-math.inf)] * largest

    def columns_at(self, offset: int) -> list[Value]:
        """This thread's columns of a small array in the order of `head_place`."""
        place = self.block.small + self.thread.column * self.heads
        loads = range(0, self.heads, 16)
        return [x for k in loads for x in load_shared(place, "ffff", offset + k)]

    def weigh(
        self,
        logits: list[Value],
        operands: Operands,
        own_slot: Value,
        block_slot: Value,
        number: Value,
        state: list[Value],
    ) -> list[Value]:
        """Stores the weights of a block of keys and adds them to the sums; the state then."""
        block, sums, largest = self.block, state[: self.kept], state[self.kept :]
        if operands.weight is not None:
            # 2^e of a row whose weight is 2^-e; finite, too, where a mask made the weight 0.
            up = [(i32(254 << 23) - weight.as_i32()).as_f32() for weight in operands.weight]
            logits = [x * up[wgmma.row_of(i)] for i, x in enumerate(logits)]
        plain = logits
        logits = [
            fma(x, operands.scale[_column(i)], operands.bias[wgmma.row_of(i)])
            for i, x in enumerate(logits)
        ]
        if largest:
            if operands.weight is not None:
                masks = [select(b.equals(-math.inf), b, f32(0.0)) for b in operands.bias]
                plain = [
                    fma(x, operands.scale[_column(i)], masks[wgmma.row_of(i)])
                    for i, x in enumerate(plain)
                ]
            else:
                plain = logits
            tops_now = _over_own_rows(plain)
            if len(tops_now) > len(largest):
                tops_now = self._halved(tops_now, 16, fmax)
            largest = [fmax(a, b) for a, b in zip(largest, tops_now, strict=True)]
        logits = self.limit(number, logits)
        tops: list[Value] = []
        for i, x in enumerate(logits):
            over = x - operands.reference[_column(i)]
            tops = [*tops, over] if i < 4 else [*tops[1:], fmax(tops[0], over)]
        top = fmax(fmax(tops[0], tops[1]), fmax(tops[2], tops[3]))
        # Also the place where all warps have read the rotary values that the weights replace.
        raised = any_of(BARRIER, WARPGROUP, top > LARGEST_WEIGHT)
        done = branch(
            raised,
            sums + operands.reference,
            lambda: self._raise_references(logits, block_slot, sums),
        )
        sums, reference = done[: self.kept], done[self.kept :]

        pack = pack_f16 if block.format.dtype == "f16" else pack_bf16
        place = block.weights + own_slot * block.weight_bytes + self.row * wgmma.ROW_BYTES
        totals: list[Value] = []
        for v in range(self.heads // 8):
            p = [exp2(logits[4 * v + i] - reference[2 * v + (i & 1)]) for i in range(4)]
            chunk = ((self.thread.quad ^ v) << 4) + self.thread.column * 4
            for r in range(2):
                words = [pack(p[2 * r], p[2 * r + 1])]
                store_shared(place + chunk, words, wgmma.ATOM_BYTES * r)
            for e in range(2):
                if operands.weight is None:
                    totals.append(p[e] + p[2 + e])
                else:
                    upper = p[e] * operands.weight[0]
                    totals.append(fma(p[2 + e], operands.weight[1], upper))
        flag = block.small + block_slot * 4
        when(
            self.thread.index.equals(0),
            lambda: store_shared(flag, [select(raised, i32(1), i32(0))], block.memory.flags),
        )
        proxy_fence()
        block.weighted.arrive_warp(own_slot, self.thread)
        totals = self._over_rows(totals)
        return [*(x + t for x, t in zip(sums, totals, strict=True)), *largest]

    def _head(self, i: int) -> Value:
        """Of a logit, its number in the block."""
        return self.thread.column * 2 + (8 * (i >> 2) + (i & 1))

    def _key(self, i: int) -> Value:
        """Of a logit, its number in the block of keys."""
        return self.thread.warp * 16 + self.thread.quad + 8 * wgmma.row_of(i)

    def _raise_references(
        self, logits: list[Value], block_slot: Value, sums: list[Value]
    ) -> list[Value]:
        """Raises the reference where a weight passes the largest; the sums and references then."""
        block, memory = self.block, self.block.memory
        partial = block.small + memory.partial + self.thread.warp * (4 * self.heads)
        self._store_largest(partial, _over_own_rows(logits))
        named_barrier(BARRIER, WARPGROUP)
        decay = block.small + memory.decay + block_slot * (4 * self.heads)

        def raise_one() -> None:
            head = self.thread.index
            top = self._joined(head, fmax)
            place = block.small + head_place(head, self.heads)
            (old,) = load_shared(place, "f", memory.reference)
            new = select(top > old + LARGEST_WEIGHT, top - RAISED_WEIGHT, old)
            store_shared(place, [new], memory.reference)
            store_shared(decay + head * 4, [exp2(old - new)])

        when(self.thread.index < self.heads, raise_one)
        named_barrier(BARRIER, WARPGROUP)
        decayed = [
            x * load_shared(decay + column * 4, "f")[0]
            for x, column in zip(sums, self.columns, strict=True)
        ]
        return decayed + self.columns_at(memory.reference)

    def finish(self, state: list[Value]) -> None:
        """Stores the results of every head but its output, and the factor on that."""
        block, head = self.block, self.thread.index
        sums, largest = state[: self.kept], state[self.kept :]
        partial = block.small + block.memory.partial + self.thread.warp * (4 * self.heads)
        named_barrier(BARRIER, WARPGROUP)
        top = None
        if largest:
            self._store_largest(partial, largest)
            named_barrier(BARRIER, WARPGROUP)
            # A thread without a head reads that of another.
            top = self._joined(head & (self.heads - 1), fmax)
            named_barrier(BARRIER, WARPGROUP)
        for x, column in zip(sums, self.columns, strict=True):
            store_shared(partial + column * 4, [x])
        named_barrier(BARRIER, WARPGROUP)
        when(head < self.heads, lambda: self._finish_head(top))

    def _finish_head(self, top: Value | None) -> None:
        block, head = self.block, self.thread.index
        total = self._joined(head, lambda a, b: a + b)
        place = block.small + head_place(head, self.heads)
        (reference,) = load_shared(place, "f", block.memory.reference)
        factor = finish_head(block, head, reference, total, top, head < self.heads)
        store_shared(block.small + head * 4, [factor], block.memory.out_factor)

    def _store_largest(self, partial: Value, tops: list[Value]) -> None:
        """Stores the largest of each column over the rows of this warp."""
        masks, lane = [4, 8, 16], self.thread.lane
        if len(tops) < self.heads // 4:  # of this half of the warp alone
            partial = partial + (lane >> 4) * (2 * self.heads)
            masks.pop()
        writes = (lane & sum(masks)).equals(0)
        place = partial + self.thread.column * 8
        for i, top in enumerate(tops):
            for mask in masks:
                top = fmax(top, shuffle_xor(top, mask))

            def store(i: int = i, top: Value = top) -> None:
                store_shared(place, [top], 32 * (i // 2) + 4 * (i & 1))

            when(writes, store)

    def _joined(self, head: Value, join: Callable[[Value, Value], Value]) -> Value:
        """A head's `partial` values of the four warps, joined."""
        place = self.block.small + head * 4
        offset = self.block.memory.partial
        values = [load_shared(place, "f", offset + 4 * self.heads * w)[0] for w in range(4)]
        return join(join(join(values[0], values[1]), values[2]), values[3])

    def _over_rows(self, x: list[Value]) -> list[Value]:
        """The sums of this thread's columns over the warp's rows: each lane keeps some columns."""
        for mask in (16, 8, 4):
            if len(x) == 1:
                x = [x[0] + shuffle_xor(x[0], mask)]
                continue
            x = self._halved(x, mask, lambda a, b: a + b)
        return x

    def _halved(
        self, x: list[Value], mask: int, join: Callable[[Value, Value], Value]
    ) -> list[Value]:
        """Joined with the lane across the mask: the lower keeps the first half."""
        half = len(x) // 2
        upper = (self.thread.lane & mask).equals(mask)
        keep = [select(upper, b, a) for a, b in zip(x[:half], x[half:], strict=True)]
        give = [select(upper, a, b) for a, b in zip(x[:half], x[half:], strict=True)]
        return [join(a, shuffle_xor(b, mask)) for a, b in zip(keep, give, strict=True)]

    def _kept_columns(self) -> list[Value]:
        """The columns that `_over_rows` leaves to this lane."""
        first, span = i32(0), self.heads // 4
        for mask in (16, 8, 4):
            if span > 1:
                span //= 2
                first = first + select((self.thread.lane & mask).equals(mask), i32(span), i32(0))
        column = ((first >> 1) << 3) + (self.thread.column << 1) + (first & 1)
        return [column + k for k in range(self.kept)]


def _over_own_rows(logits: list[Value]) -> list[Value]:
    """The largest of each of this thread's columns over its two rows."""
    pairs = range(0, len(logits), 4)
    return [fmax(logits[i + e], logits[i + 2 + e]) for i in pairs for e in range(2)]


def _column(i: int) -> int:
    """Which of its columns."""
    return 2 * (i >> 2) + (i & 1)
