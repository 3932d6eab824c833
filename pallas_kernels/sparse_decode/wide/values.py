"""The warpgroups of the second product: each adds up 256 columns of the output."""

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import global_address, load_shared, store_global, store_shared
from pallas_kernels.device.row_formats import RANK, pack_bf16
from pallas_kernels.device.simt import WARPGROUP, Value, branch, f32, i32, loop, ptx, when
from pallas_kernels.device.sync import Ring, named_barrier
from pallas_kernels.sparse_decode.wide.block import (
    COLUMN_TILE,
    MEMORY,
    SHARES,
    STAGES,
    WARPS,
    Block,
)
from pallas_kernels.sparse_decode.wide.queries import load_query

BARRIER = 9  # and the next
STEPS = 4  # of 16 keys
PRODUCTS = 2  # of 128 columns
SIZE = 64  # floats of a thread in one of them
ROW_BYTES = 512  # of a head's 256 columns in bf16


def values(block: Block, half: int) -> None:
    """O = P V for columns 256 half to 256 half + 255, over all blocks of keys."""
    load_query(block, 1 + half)
    block.meet()
    first, last = block.key_blocks(block.length())

    def step(_: Value, *carry: Value) -> list[Value]:
        acc, ring = list(carry[:-2]), Ring(STAGES, *carry[-2:])
        block.wait_for_rows(ring)
        block.weighted.wait(ring.slot * SHARES, ring.phase)
        acc = _decayed(block, acc, ring.slot)
        acc = _add(block, half, acc, ring)
        block.release(block.empty, ring.slot)
        return [*acc, *ring.next().values()]

    zeros = [f32(0.0)] * (PRODUCTS * SIZE)
    carry = loop(first, last, [*zeros, *Ring.start(STAGES).values()], step)
    block.factor_ready.wait(0, i32(0))
    # The output takes the place of values that other warps may be multiplying.
    named_barrier(BARRIER + half, WARPGROUP)
    if block.paired:
        # Nor are rows there on their way to the other block.
        latest = Ring(STAGES, *carry[-2:]).previous()
        for use in (latest.previous(), latest):
            block.empty.wait(use.slot, use.phase)
    _store(block, half, list(carry[:-2]))


def _add(block: Block, half: int, acc: list[Value], ring: Ring) -> list[Value]:
    """The accumulator with a block of keys, of which the first share has its weights."""
    slot = ring.slot
    tile = block.tile(slot)
    a = wgmma.descriptor(block.weights(slot))
    b = wgmma.descriptor(tile + half * (4 * COLUMN_TILE), COLUMN_TILE)
    acc = wgmma.begin(acc)
    for step in range(STEPS):
        if step and step % (STEPS // block.shares) == 0:
            wgmma.commit()
            share = step // (STEPS // block.shares)
            block.weighted.wait(slot * SHARES + share, ring.phase)
        for product in range(PRODUCTS):
            part = slice(product * SIZE, (product + 1) * SIZE)
            columns = (product * 2 * COLUMN_TILE + step * 2 * wgmma.ATOM_BYTES) >> 4
            acc[part] = wgmma.step_from_shared(
                acc[part],
                a + ((32 * step) >> 4),
                b + columns,
                dtype=block.format.dtype,
                b_is_k_major=False,
            )
    wgmma.commit()
    return wgmma.wait(0, acc)


def _decayed(block: Block, acc: list[Value], slot: Value) -> list[Value]:
    """The accumulator relative to the references that this block of keys has raised."""
    place = block.small + slot * (4 * WARPS) + block.thread.warp * 4
    (flag,) = load_shared(place, "r", MEMORY.raised)

    def decay() -> list[Value]:
        place = block.small + block.head_row() * 4
        factors = [load_shared(place, "f", MEMORY.decay + 32 * r)[0] for r in range(2)]
        return [x * factors[wgmma.row_of(i)] for i, x in enumerate(acc)]

    return branch(flag.equals(1), acc, decay)


def _store(block: Block, half: int, acc: list[Value]) -> None:
    """Writes the output: bf16 if it is final, else f32."""
    place = block.small + block.head_row() * 4
    factors = [load_shared(place, "f", MEMORY.tokens + 32 * r)[0] for r in range(2)]
    acc = [x * factors[wgmma.row_of(i)] for i, x in enumerate(acc)]
    if block.shape.final:
        _store_rows(block, half, acc)
    else:
        _store_parts(block, half, acc)


def _store_rows(block: Block, half: int, acc: list[Value]) -> None:
    """Through shared memory, where only this warpgroup has read: a row of 512 bytes at a time."""
    thread = block.thread
    own = block.tiles + half * (4 * COLUMN_TILE) + thread.warp * (16 * ROW_BYTES)
    row = own + thread.quad * ROW_BYTES + thread.column * 4
    for i in range(0, len(acc), 4):
        place = row + ((thread.quad ^ (i // 4)) << 4)
        for r in range(2):
            store_shared(place, [pack_bf16(acc[i + 2 * r], acc[i + 2 * r + 1])], 8 * r * ROW_BYTES)
    ptx("bar.warp.sync -1;", convergent=True)
    out = global_address(block.arrays["out"])
    for r in range(16):
        number = block.first_head + thread.warp * 16 + r

        def store(r: int = r, number: Value = number) -> None:
            words = load_shared(own + ((thread.lane ^ (r & 7)) << 4), "rrrr", r * ROW_BYTES)
            row = out + (block.result_row(number) * RANK + 256 * half) * 2
            store_global(row + (thread.lane << 4).wide(), words)

        when(number < block.shape.heads, store)


def _store_parts(block: Block, half: int, acc: list[Value]) -> None:
    """From the registers: eight lines of 32 bytes at a time."""
    out, thread = global_address(block.arrays["out"]), block.thread
    for r in range(2):
        number = block.first_head + block.head_row() + 8 * r

        def store(r: int = r, number: Value = number) -> None:
            column = thread.column * 2 + 256 * half
            row = out + (block.result_row(number) * RANK + column.wide()) * 4
            for i in range(0, len(acc), 4):
                store_global(row, acc[i + 2 * r : i + 2 * r + 2], 8 * i)

        when(number < block.shape.heads, store)
