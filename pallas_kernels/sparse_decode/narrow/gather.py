"""The warpgroup that copies the named rows into shared memory."""

from collections.abc import Callable

from pallas_kernels.device.memory import CHUNK, copied_bytes, copy, global_address
from pallas_kernels.device.row_formats import Part, swizzle
from pallas_kernels.device.simt import Value, i32, loop, minimum, select, shuffle
from pallas_kernels.device.sync import Ring
from pallas_kernels.sparse_decode.narrow.block import Block
from pallas_kernels.sparse_decode.task import row_or_first

WARP_BYTES = 32 * CHUNK


def gather(block: Block) -> None:
    """Fills the ring with the rows of all blocks of keys, a stage at a time.

    A slot that is not in the cache, or not within the query's length, becomes a row of zeros that
    is masked. Nothing is read in its place.
    """
    thread, row_format = block.thread, block.format
    length = block.length()
    first, last = block.key_blocks(length)
    slot_at = block.keys.slots()
    per_warp = block.tuning.rows // 4
    own_row = thread.warp * per_warp + (thread.lane & (per_warp - 1))

    def named_slot(stage: Value) -> Value:
        return slot_at(stage * block.tuning.rows + own_row, length)

    def scales(slot: Value) -> list[Value]:
        scale = row_format.scale
        if scale is None:
            return []
        base = global_address(block.arrays[scale.array]) + scale.offset
        source = base + block.row_offset(scale, row_or_first(slot))
        return row_format.load_scales(source, thread)

    def step(stage: Value, slot: Value, following: Value, *rest: Value) -> list[Value]:
        words, ring = rest[:-2], Ring(block.tuning.stages, *rest[-2:])
        # Read a stage ahead, the slots two: the copies must not wait for them.
        following_words = scales(following)
        block.empty.wait(ring.slot, ring.phase ^ 1)
        _copy_nope(block, ring, slot, per_warp)
        _copy_rope(block, ring, slot)
        tokens = block.tokens + ring.slot * block.token_bytes
        row_format.store_token(tokens, own_row, slot < 0, words, thread, block.tuning.rows)
        block.full.arrive_warp(ring.slot, thread)
        block.full.arrive_on_copies(ring.slot)
        return [following, named_slot(stage + 2), *following_words, *ring.next().values()]

    first_stage = first * block.pieces
    slot, following = named_slot(first_stage), named_slot(first_stage + 1)
    carry = [slot, following, *scales(slot), *Ring.start(block.tuning.stages).values()]
    loop(first_stage, last * block.pieces, carry, step)


def _copy_nope(block: Block, ring: Ring, slot: Value, per_warp: int) -> None:
    part, row_bytes, stored = block.format.nope, block.format.nope_bytes, block.format.stored_bytes
    tile = block.nope + ring.slot * block.tile_bytes
    if row_bytes < WARP_BYTES:
        _copy_short_rows(block, part, row_bytes, tile, slot, lambda row: swizzle(row & 7))
        return
    base = global_address(block.arrays[part.array]) + part.offset
    lane_bytes = block.thread.lane * CHUNK
    own_bytes = lane_bytes if stored is None else minimum(lane_bytes, stored - CHUNK)
    tile = tile + block.thread.warp * (per_warp * row_bytes) + lane_bytes
    for row in range(per_warp):
        named = shuffle(slot, row)
        source = base + block.row_offset(part, row_or_first(named)) + own_bytes.wide()
        place = (tile ^ (swizzle(row & 7) * CHUNK)) + row * row_bytes
        copied = copied_bytes(named)
        if stored is not None:  # zeros in the place of what is padding here
            copied = select(lane_bytes < stored, copied, i32(0))
        for piece in range(0, row_bytes, WARP_BYTES):
            copy(place + piece, source + piece, copied)


def _copy_rope(block: Block, ring: Ring, slot: Value) -> None:
    tile = block.rope + ring.slot * block.weight_bytes
    mix = (lambda row: row & 7) if block.format.rope_is_swizzled else None
    _copy_short_rows(block, block.format.rope, block.format.rope_bytes, tile, slot, mix)


def _copy_short_rows(
    block: Block,
    part: Part,
    row_bytes: int,
    tile: Value,
    slot: Value,
    mix: Callable[[Value], Value] | None,
) -> None:
    """Copies several rows of less than `WARP_BYTES` at a time, with chunks xored by `mix`."""
    per_warp, chunks = block.tuning.rows // 4, row_bytes // CHUNK
    base = global_address(block.arrays[part.array]) + part.offset
    chunk = block.thread.lane % chunks
    tile = tile + block.thread.warp * (per_warp * row_bytes)
    for row in range(0, per_warp, WARP_BYTES // row_bytes):
        own = block.thread.lane // chunks + row
        named = shuffle(slot, own)
        source = base + block.row_offset(part, row_or_first(named)) + (chunk * CHUNK).wide()
        place = chunk if mix is None else chunk ^ mix(own)
        copy(tile + own * row_bytes + place * CHUNK, source, copied_bytes(named))
