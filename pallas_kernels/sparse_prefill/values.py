"""The warpgroups of the second product: each adds up 256 columns of the output."""

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import global_address, load_shared, store_global
from pallas_kernels.device.row_formats import RANK, pack_bf16
from pallas_kernels.device.simt import Value, branch, f32, i32, loop, select, shuffle_xor, when
from pallas_kernels.device.sync import Ring
from pallas_kernels.sparse_decode.task import Task
from pallas_kernels.sparse_prefill.block import MEMORY, Block, key_blocks
from pallas_kernels.sparse_prefill.tuning import COLUMN_TILE, HEADS, ROPE_TILE, SHARES, STEPS, WARPS

PRODUCTS = 2  # of 128 columns: one of 256 would take more registers than a launch begins with
SIZE = 64  # floats of a thread in one of them
ROWS = 2  # heads of a thread


def values(block: Block, half: int) -> None:
    """O = P V for columns 256 half to 256 half + 255, of one task after another."""

    def one(index: Value, carry: list[Value]) -> list[Value]:
        task, turn = block.task(index), Ring(1, *carry[1:])

        def step(number: Value, *carry: Value) -> list[Value]:
            acc, phases, stage = list(carry[:-1]), carry[-1], number & 1
            phase = (phases >> stage) & 1
            block.decided.wait(stage, phase)
            acc = _decayed(block, acc, stage)
            acc = _add(block, half, acc, stage, phase)
            return [*acc, phases ^ (i32(1) << stage)]

        zeros = [f32(0.0)] * (PRODUCTS * SIZE)
        *acc, phases = loop(0, key_blocks(task.length()), [*zeros, carry[0]], step)
        block.result_full.wait(0, turn.phase)
        place = block.small + block.head_row() * 4
        factors = [load_shared(place, "f", MEMORY.factor + 32 * r)[0] for r in range(ROWS)]
        block.result_empty.arrive_warp(0, block.thread)
        _store(block, task, half, [x * factors[wgmma.row_of(i)] for i, x in enumerate(acc)])
        return [phases, *turn.next().values()]

    # A bit for each stage, flipped whenever it has been used.
    block.for_each_task([i32(0), *Ring.start(1).values()], one)


def _add(block: Block, half: int, acc: list[Value], stage: Value, phase: Value) -> list[Value]:
    """The accumulator with the keys of a stage.

    The rows of a step are free as soon as it is done, weights included, which lie where the
    rotary values of just these rows were.
    """
    tile = block.tile(stage)
    a = wgmma.plain_descriptor(tile + ROPE_TILE)
    b = wgmma.descriptor(tile + half * (4 * COLUMN_TILE), COLUMN_TILE)
    for step in range(STEPS):
        share, rest = divmod(step, STEPS // SHARES)
        if not rest:
            block.weighted.wait(stage * SHARES + share, phase)
        if not step:
            acc = wgmma.begin(acc)
        for product in range(PRODUCTS):
            part = slice(product * SIZE, (product + 1) * SIZE)
            columns = (product * 2 * COLUMN_TILE + step * 2 * wgmma.ATOM_BYTES) >> 4
            acc[part] = wgmma.step_from_shared(
                acc[part],
                a + ((step * 2 * wgmma.PLAIN_COLUMN_BYTES) >> 4),
                b + columns,
                dtype="bf16",
                b_is_k_major=False,
            )
        wgmma.commit()
    for step in range(STEPS):
        pending = STEPS - 1 - step
        if pending:
            # What the sums' registers hold is not looked at before all is done.
            wgmma.wait(pending, [])
        else:
            acc = wgmma.wait(0, acc)
        block.empty.arrive_warp(stage * WARPS + step, block.thread)
    return acc


def _decayed(block: Block, acc: list[Value], stage: Value) -> list[Value]:
    """The accumulator relative to the references that this stage has raised."""
    flag = block.small + (stage * WARPS + block.thread.warp) * 4
    (raised,) = load_shared(flag, "r", MEMORY.raised)

    def decay() -> list[Value]:
        place = block.small + stage * (4 * HEADS) + block.head_row() * 4
        factors = [load_shared(place, "f", MEMORY.decay + 32 * r)[0] for r in range(ROWS)]
        return [x * factors[wgmma.row_of(i)] for i, x in enumerate(acc)]

    return branch(raised.equals(1), acc, decay)


def _store(block: Block, task: Task, half: int, acc: list[Value]) -> None:
    """Writes the output from the registers, in whole sectors of 32 bytes.

    Two neighbouring threads exchange words, so that each has eight bytes of a row and both
    together with the other two of the quad have 32.
    """
    thread = block.thread
    odd = (thread.column & 1).equals(1)
    out = global_address(block.arrays["out"])
    for r in range(ROWS):
        head = task.first_head + block.head_row() + 8 * r
        words = [pack_bf16(acc[i + 2 * r], acc[i + 2 * r + 1]) for i in range(0, len(acc), 4)]
        exchanged = []
        for a, b in zip(words[::2], words[1::2], strict=True):
            other = shuffle_xor(select(odd, a, b), 1)
            exchanged.append([select(odd, other, a), select(odd, b, other)])

        def store(head: Value = head, exchanged: list[list[Value]] = exchanged) -> None:
            column = ((thread.column & 1) << 3) + ((thread.column >> 1) << 2) + 256 * half
            row = out + (task.result_row(head) * RANK + column.wide()) * 2
            for k, pair in enumerate(exchanged):
                store_global(row, pair, 32 * k, streams=True)

        when(head < block.shape.heads, store)
