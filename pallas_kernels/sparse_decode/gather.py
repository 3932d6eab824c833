"""The warpgroup that copies the named rows into shared memory."""

import math

from pallas_kernels.device.memory import global_address, load_global, store_f16, store_shared
from pallas_kernels.device.row_formats import swizzle
from pallas_kernels.device.simt import (
    Value,
    f32,
    i32,
    int_to_float,
    loop,
    minimum,
    ptx,
    select,
    shuffle,
    when,
)
from pallas_kernels.device.sync import Ring
from pallas_kernels.sparse_decode.block import Block

CHUNK = 16  # bytes of one copy
WARP_BYTES = 32 * CHUNK
# 2^-64: rows of smaller scales, and of zeros, count as of this one. Their weights in the sum of
# weights, 2^64, and the others', relative to theirs, stay within f32.
SMALLEST_POWER = (127 - 64) << 23


def gather(block: Block) -> None:
    """Fills the ring with the rows of all blocks of keys, a stage at a time.

    A slot that is not in the cache, or not within the query's length, becomes a row of zeros that
    is masked. Nothing is read in its place.
    """
    thread, shape, row_format = block.thread, block.shape, block.format
    length = block.length()
    first, last = block.key_blocks(length)
    indices = global_address(block.arrays["indices"]) + block.row.wide() * (4 * shape.topk)
    per_warp = block.tuning.rows // 4
    own_row = thread.warp * per_warp + (thread.lane & (per_warp - 1))

    def named_slot(stage: Value) -> Value:
        place = stage * block.tuning.rows + own_row
        (slot,) = load_global(indices + minimum(place, shape.topk - 1).wide() * 4, "r")
        return select((place < length) & slot.below(shape.num_slots), slot, i32(-1))

    def scales(slot: Value) -> list[Value]:
        scale = row_format.scale
        if scale is None:
            return []
        base = global_address(block.arrays[scale.array]) + scale.offset
        return load_global(base + _row_or_first(slot) * scale.stride, "rrrr")

    def step(stage: Value, slot: Value, following: Value, *rest: Value) -> list[Value]:
        words, ring = rest[:-2], Ring(block.tuning.stages, *rest[-2:])
        # Read a stage ahead, the slots two: the copies must not wait for them.
        following_words = scales(following)
        block.empty.wait(ring.slot, ring.phase ^ 1)
        _copy_nope(block, ring, slot, per_warp)
        _copy_rope(block, ring, slot, per_warp)
        when(
            thread.lane < per_warp,
            lambda: _store_token(block, ring, own_row, slot, list(words)),
        )
        block.full.arrive_warp(ring.slot, thread)
        block.full.arrive_on_copies(ring.slot)
        return [following, named_slot(stage + 2), *following_words, *ring.next().values()]

    first_stage = first * block.pieces
    slot, following = named_slot(first_stage), named_slot(first_stage + 1)
    carry = [slot, following, *scales(slot), *Ring.start(block.tuning.stages).values()]
    loop(first_stage, last * block.pieces, carry, step)


def _row_or_first(slot: Value) -> Value:
    return select(slot < 0, i32(0), slot).wide()


def _copy(destination: Value, source: Value, size: Value) -> None:
    ptx(f"cp.async.cg.shared.global.L2::256B [$0], [$1], {CHUNK}, $2;", destination, source, size)


def _copied_bytes(slot: Value) -> Value:
    """Copies of fewer bytes than a chunk fill the rest with zeros."""
    return select(slot < 0, i32(0), i32(CHUNK))


def _copy_nope(block: Block, ring: Ring, slot: Value, per_warp: int) -> None:
    part, row_bytes = block.format.nope, block.format.nope_bytes
    base = global_address(block.arrays[part.array]) + part.offset
    lane_bytes = block.thread.lane * CHUNK
    tile = block.nope + ring.slot * block.tile_bytes
    tile = tile + block.thread.warp * (per_warp * row_bytes) + lane_bytes
    for row in range(per_warp):
        named = shuffle(slot, row)
        source = base + _row_or_first(named) * part.stride + lane_bytes.wide()
        place = (tile ^ (swizzle(row & 7) * CHUNK)) + row * row_bytes
        for piece in range(0, row_bytes, WARP_BYTES):
            _copy(place + piece, source + piece, _copied_bytes(named))


def _copy_rope(block: Block, ring: Ring, slot: Value, per_warp: int) -> None:
    part, row_bytes = block.format.rope, block.format.rope_bytes
    base = global_address(block.arrays[part.array]) + part.offset
    chunks = row_bytes // CHUNK
    chunk = block.thread.lane % chunks
    tile = block.rope + ring.slot * block.weight_bytes + block.thread.warp * (per_warp * row_bytes)
    for row in range(0, per_warp, WARP_BYTES // row_bytes):
        own = block.thread.lane // chunks + row
        named = shuffle(slot, own)
        source = base + _row_or_first(named) * part.stride + (chunk * CHUNK).wide()
        place = chunk ^ (own & 7) if block.format.rope_is_swizzled else chunk
        _copy(tile + own * row_bytes + place * CHUNK, source, _copied_bytes(named))


def _store_token(block: Block, ring: Ring, row: Value, slot: Value, scales: list[Value]) -> None:
    """What is kept beside a row.

    A row's scales are taken as 2^e times numbers below 2, where 2^e is its largest scale's power
    of two. f16 holds the numbers, exactly if the scales are powers of two; e joins the logits, so
    that weights P are relative to what they contribute, and f16 holds these too.
    """
    base = block.tokens + ring.slot * block.token_bytes
    masked = slot < 0
    if not block.format.block_scales:
        store_shared(base + row * 4, [select(masked, f32(-math.inf), f32(0.0))], block.bias)
        return
    top = scales[0] & 0x7F800000
    for scale in scales[1:]:
        exponent = scale & 0x7F800000
        top = select(top < exponent, exponent, top)
    top = select(top < SMALLEST_POWER, i32(SMALLEST_POWER), top)
    inverse = (i32(254 << 23) - top).as_f32()
    bias = int_to_float((top >> 23) - 127)
    store_shared(base + row * 4, [select(masked, f32(-math.inf), bias)], block.bias)
    store_shared(base + row * 4, [select(masked, f32(0.0), inverse)], block.weight)
    for group, scale in enumerate(scales):
        relative = select(masked, f32(0.0), scale.as_f32() * inverse)
        rounded = store_f16(base + row * 2, relative, block.relative_scale(group))
        if not block.format.scales_are_powers:
            store_f16(base + row * 2, relative - rounded, block.scale_rest(group))
