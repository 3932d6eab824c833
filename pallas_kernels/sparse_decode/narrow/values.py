"""The warpgroups of the second product: each adds up 256 columns of the output."""

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import global_address, load_shared, store_global
from pallas_kernels.device.row_formats import RANK, pack_bf16
from pallas_kernels.device.simt import Value, branch, f32, i32, loop, opaque, when
from pallas_kernels.device.sync import Ring
from pallas_kernels.sparse_decode.narrow.block import Block
from pallas_kernels.sparse_decode.narrow.queries import load_query

STEPS = 4  # of 16 keys in a block
TILES = 4  # of 64 columns in a warpgroup's half


def values(block: Block, half: int) -> None:
    """O^T = V^T P^T for columns 256 half to 256 half + 255, over all blocks of keys."""
    load_query(block, 1 + half)
    first, last = block.key_blocks(block.length())
    accumulator = _Accumulator(block, half)

    def step(_: Value, *carry: Value) -> list[Value]:
        acc, ring = list(carry[:-2]), Ring(block.tuning.stages, *carry[-2:])
        pieces = block.pieces_from(ring)
        return [*accumulator.add(acc, pieces), *pieces[-1].next().values()]

    zeros = [f32(0.0)] * (TILES * accumulator.size)
    carry = loop(first, last, [*zeros, *Ring.start(block.tuning.stages).values()], step)
    block.factor_ready.wait(0, i32(0))
    accumulator.store(carry[:-2])


class _Accumulator:
    """Four tiles of 64 columns by the block's heads; `size` floats of each in this thread."""

    def __init__(self, block: Block, half: int) -> None:
        self.block, self.thread, self.half = block, block.thread, half
        self.heads = block.tuning.heads
        self.size = self.heads // 2
        self.address = block.format.address(block.thread, block.row_in_stage(), half)
        self.steps = STEPS // block.pieces
        self.factors = block.tokens
        if block.format.block_scales:
            self.factors = block.format.value_factors_at(
                block.tokens, block.thread, half, block.tuning.rows
            )

    def add(self, acc: list[Value], pieces: list[Ring]) -> list[Value]:
        """The accumulator with a block of keys, whose stages it releases."""
        block, thread = self.block, self.thread
        for ring in pieces:
            block.full.wait(ring.slot, ring.phase)
        fragments = self._fragments(pieces, 0)
        for ring in pieces:
            block.weighted.wait(ring.slot, ring.phase)
        # The next logits go first: the softmax after them is what takes long.
        following = pieces[-1].next()
        for _ in pieces:
            block.scored.wait(following.slot, following.phase)
            following = following.next()

        acc = self._decayed(acc, pieces[0].slot)
        weights = [
            opaque(wgmma.descriptor(block.weights + ring.slot * block.weight_bytes))
            for ring in pieces
        ]
        for step in range(STEPS):
            fenced = wgmma.begin([*fragments, *acc])
            fragments, acc = fenced[:16], fenced[16:]
            b = weights[step // self.steps] + ((2 * wgmma.ATOM_BYTES * (step % self.steps)) >> 4)
            for tile in range(TILES):
                part = slice(tile * self.size, (tile + 1) * self.size)
                a = fragments[4 * tile : 4 * tile + 4]
                acc[part] = wgmma.step(
                    acc[part], a, b, dtype=block.format.dtype, b_is_k_major=False
                )
            wgmma.commit()
            acc = wgmma.wait(0, acc)
            if step + 1 < STEPS:
                fragments = self._fragments(pieces, step + 1)
        for ring in pieces:
            block.empty.arrive_warp(ring.slot, thread)
        return acc

    def _fragments(self, pieces: list[Ring], step: int) -> list[Value]:
        """V^T of 16 keys: a fragment for each tile."""
        block = self.block
        ring, step = pieces[step // self.steps], step % self.steps
        stage = block.stage(ring.slot, self.factors)
        rows = block.tuning.rows
        return block.format.value_fragments(stage, self.address, step, self.half, rows)

    def _decayed(self, acc: list[Value], slot: Value) -> list[Value]:
        """The accumulator relative to the references that this block of keys has raised."""
        block = self.block
        (flag,) = load_shared(block.small + slot * 4, "r", block.memory.flags)

        def decay() -> list[Value]:
            place = block.small + slot * (4 * self.heads) + self.thread.column * 8
            scaled = list(acc)
            for v in range(self.heads // 8):
                factors = load_shared(place, "ff", block.memory.decay + 32 * v)
                for tile in range(TILES):
                    for i in range(4):
                        k = tile * self.size + 4 * v + i
                        scaled[k] = scaled[k] * factors[i & 1]
            return scaled

        return branch(flag.equals(1), acc, decay)

    def store(self, acc: list[Value]) -> None:
        """Writes the output: bf16 if it is final, else f32."""
        block, thread = self.block, self.thread
        column = thread.warp * 64 + thread.quad * 8 + 256 * self.half
        place = block.small + thread.column * 8
        out = global_address(block.arrays["out"])
        for v in range(self.heads // 8):
            factors = load_shared(place, "ff", block.memory.out_factor + 32 * v)
            for e in range(2):
                head = block.first_head + thread.column * 2 + (8 * v + e)
                # The order of `RowFormat.value_fragments`: eight consecutive columns.
                x = [
                    acc[tile * self.size + 4 * v + 2 * r + e] * factors[e]
                    for tile in range(TILES)
                    for r in range(2)
                ]

                def store(head: Value = head, x: list[Value] = x) -> None:
                    element = block.result_row(head) * RANK + column.wide()
                    if not block.shape.final:
                        store_global(out + element * 4, x[:4])
                        store_global(out + element * 4, x[4:], 16)
                    else:
                        words = [pack_bf16(x[2 * i], x[2 * i + 1]) for i in range(4)]
                        store_global(out + element * 2, words)

                when(head < block.shape.heads, store)
