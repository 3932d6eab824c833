"""The two warpgroups of the logits: each has every other block of keys, and a stage for it.

While one of them weighs its keys, the tensor cores multiply those of the other.
"""

from pallas_kernels.device import wgmma
from pallas_kernels.device.row_formats import TILE
from pallas_kernels.device.simt import (
    WARPGROUP,
    Value,
    f32,
    i32,
    loop,
    minimum,
    opaque,
    ptx,
    select,
    when,
)
from pallas_kernels.device.sync import Ring, named_barrier, proxy_fence
from pallas_kernels.sparse_decode.tuning import SLOTS
from pallas_kernels.sparse_prefill.block import Block, key_blocks, tasks_of
from pallas_kernels.sparse_prefill.gather import Copier
from pallas_kernels.sparse_prefill.softmax import BARRIER, Softmax, State
from pallas_kernels.sparse_prefill.tuning import COLUMN_TILE, GROUPS, LANDINGS, PARTS

SIZE = TILE // 2  # logits of a thread


def scores(block: Block, group: int) -> None:
    """Copies the keys of every other block of keys, and writes their weights P."""
    copier, softmax = Copier(block, group), Softmax(block, group)
    last = tasks_of(block.shape) - 1

    first = block.task(block.number)
    copier.copy_query(first)
    copier.copy_keys(copier.slot(first.row, first.length(), i32(group)))

    def one(index: Value, carry: list[Value]) -> list[Value]:
        mine, theirs, turn = carry[0], carry[1], Ring(1, *carry[2:])
        task, later = block.task(index), block.task(minimum(index + SLOTS, last))
        length, later_length = task.length(), later.length()
        count = key_blocks(length)
        own = (count + (GROUPS - 1 - group)) // GROUPS
        # So that it is not far away when it is copied.
        copier.prefetch_query(later)
        block.query_full.wait(0, turn.phase)

        def step(k: Value, *carry: Value) -> list[Value]:
            state, is_last = State(*carry[:-1]), (k + 1).equals(own)
            # Of the next block of keys, so that it is there when they are copied.
            following = copier.slot(
                select(is_last, later.row, task.row),
                select(is_last, later_length, length),
                select(is_last, i32(group), k * GROUPS + (GROUPS + group)),
            )
            logits = wgmma.wait(0, _products(block, group))
            when(is_last, lambda: block.query_empty.arrive_warp(0, block.thread))
            state = softmax.weigh(logits, state, is_first=k.equals(0), theirs=theirs + (k + group))

            def refill() -> None:
                copier.refill(following, mine + k)

            when(k + 1 < own, refill)
            return [*state, following]

        start = [*State.start(), copier.slot(later.row, later_length, i32(group))]
        *done, following = loop(0, own, start, step)
        when(own.equals(0), lambda: block.query_empty.arrive_warp(0, block.thread))

        def begin_later() -> None:
            # Zeros for a task that has no keys for this warpgroup.
            ptx("cp.async.wait_all;")
            block.query_empty.wait(0, turn.phase)
            copier.copy_query(later)
            copier.refill(following, mine + own - 1)

        when(index + SLOTS < last + 1, begin_later)
        softmax.finish(task, State(*done), turn)
        others = count - own
        return [mine + own, theirs + others, *turn.next().values()]

    block.for_each_task([i32(0), i32(0), *Ring.start(1).values()], one)
    ptx("cp.async.wait_all;")


def _landed(group: int, pending: int) -> None:
    """Waits for all but the latest groups of this stage's copies, by the whole warpgroup."""
    ptx(f"cp.async.wait_group {pending};")
    proxy_fence()
    named_barrier(BARRIER + group, WARPGROUP)


def _products(block: Block, group: int) -> list[Value]:
    """Q K^T of this warpgroup's stage as it lands, issued, not finished."""
    # Opaque, or the descriptors of all steps would be kept in registers.
    a = wgmma.descriptor(opaque(block.query))
    b = wgmma.descriptor(opaque(block.tile(group)))
    acc, begins = [f32(0.0)] * SIZE, (0, *LANDINGS[:-1])
    for step in range(4 * (PARTS + 1)):
        part, k = divmod(step, 4)
        if k == 0 and part in begins:
            if part:
                wgmma.commit()
            _landed(group, len(LANDINGS) - 1 - begins.index(part))
            if not part:
                acc = wgmma.begin(acc)
        offset = (part * COLUMN_TILE + 32 * k) >> 4
        acc = wgmma.step_from_shared(acc, a + offset, b + offset, dtype="bf16", b_is_k_major=True)
    wgmma.commit()
    return acc
