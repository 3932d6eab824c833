"""The query in shared memory, as the right operand of the first product."""

import math
from collections.abc import Callable

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import global_address, load_global, store_shared
from pallas_kernels.device.row_formats import ROPE_DIM, pack_bf16, pack_f16
from pallas_kernels.device.simt import Value, f32, i32, minimum, ptx, select, when
from pallas_kernels.device.sync import proxy_fence
from pallas_kernels.sparse_decode.block import CONSUMER_WARPS, Block, head_place

PIECE = 8  # values that a lane takes at a time
TOP_EXPONENT = 14  # a head's largest value is below 2^15, near the end of f16
NO_LOGIT = -1e30  # a reference below every logit
INFINITY_BITS = 0x7F80


def load_query(block: Block, warpgroup: int) -> None:
    """By three warpgroups together: copies the heads of this block, a warp a head at a time.

    For e4m3 keys the query is multiplied in f16, after each head was scaled by a power of two,
    which is exact but for values 2^29 times smaller than the head's largest. Columns are in the
    order of `RowFormat.load_keys`.
    """
    warp = block.thread.warp + 4 * warpgroup
    rounds = math.ceil(block.tuning.heads / CONSUMER_WARPS)
    for first in range(0, rounds, 2):
        heads = [warp + CONSUMER_WARPS * k for k in range(first, min(first + 2, rounds))]
        loaded = [_load_head(block, head) for head in heads]
        for head, words in zip(heads, loaded, strict=True):
            _store_head(block, head, words)
    proxy_fence()
    block.query_ready.arrive_warp(0, block.thread)


def _load_head(block: Block, head: Value) -> list[list[Value]]:
    """This lane's pieces of 8 values; zeros for a head that does not exist."""
    width_bytes, count = 2 * block.format.width, block.format.width // PIECE
    number = block.first_head + head
    exists = (head < block.tuning.heads) & (number < block.shape.heads)
    row = block.row.wide() * block.shape.heads + select(exists, number, i32(0)).wide()
    source = global_address(block.arrays["q"]) + row * width_bytes
    rounds = math.ceil(count / 32)
    pieces = [minimum(block.thread.lane + 32 * k, count - 1) for k in range(rounds)]
    words = [load_global(source + (piece * (2 * PIECE)).wide(), "rrrr") for piece in pieces]
    return [[select(exists, word, i32(0)) for word in piece] for piece in words]


def _store_head(block: Block, head: Value, words: list[list[Value]]) -> None:
    up = down = f32(1.0)
    if block.format.dtype == "f16":
        up, down = _powers(words)

    def store() -> None:
        row_format = block.format
        first_rope, end = row_format.width // PIECE - ROPE_DIM // PIECE, row_format.width // PIECE
        for k, piece in enumerate(words):
            place = block.thread.lane + 32 * k

            def store_as(
                dtype: str, place: Value = place, piece: list[Value] = piece
            ) -> Callable[[], None]:
                return lambda: _store_piece(block, head, place, piece, up, dtype)

            if 32 * (k + 1) <= first_rope:
                store_as(row_format.dtype)()
                continue
            if 32 * k < first_rope:
                when(place < first_rope, store_as(row_format.dtype))
            rotary = place < end if 32 * k >= first_rope else place >= first_rope
            when(rotary, store_as(row_format.rope_dtype))
        when(block.thread.lane.equals(0), lambda: _store_constants(block, head, down))

    when(head < block.tuning.heads, store)


def _powers(words: list[list[Value]]) -> tuple[Value, Value]:
    """2^k that brings the head's largest finite value to the top of f16, and 2^-k."""
    top = i32(0)
    for piece in words:
        for word in piece:
            for exponent in (word & INFINITY_BITS, (word >> 16) & INFINITY_BITS):
                finite = select(exponent.equals(INFINITY_BITS), i32(0), exponent)
                top = select(top < finite, finite, top)
    (top,) = ptx("redux.sync.max.s32 $0, $1, -1;", top, out="r", convergent=True)
    bits = minimum(i32(127 + TOP_EXPONENT + 127) - (top >> 7), 254)
    return (bits << 23).as_f32(), ((i32(254) - bits) << 23).as_f32()


def _store_piece(
    block: Block, head: Value, piece: Value, words: list[Value], up: Value, dtype: str
) -> None:
    part, thread_column = piece >> 3, (piece & 7) >> 1
    row = block.query + (head >> 3) * wgmma.ATOM_BYTES + (head & 7) * wgmma.ROW_BYTES
    tile = row + part * (block.tuning.heads * wgmma.ROW_BYTES) + thread_column * 4
    pack = pack_f16 if dtype == "f16" else pack_bf16
    for i, word in enumerate(words):
        if block.format.dtype == "f16":
            first = 2 * i if block.format.partner == 1 else i
            pair = (first, first + block.format.partner)
            low, high = (_widened(words, column) * up for column in pair)
            word = pack(low, high)
        chunk = ((piece & 1) << 2) + i
        store_shared(tile + ((chunk ^ (head & 7)) << 4), [word])


def _widened(words: list[Value], i: int) -> Value:
    """The i-th bf16 of some words, as a float."""
    word = words[i // 2]
    return ((word & -65536) if i % 2 else (word << 16)).as_f32()


def _store_constants(block: Block, head: Value, down: Value) -> None:
    (scale,) = load_global(global_address(block.arrays["sm_scale"]), "f")
    if block.shape.has_scale:
        scale = scale * load_global(global_address(block.arrays["scale"]), "f")[0]
    place = block.small + head_place(head, block.tuning.heads)
    store_shared(place, [scale * math.log2(math.e) * down], block.memory.scale)
    store_shared(place, [f32(NO_LOGIT)], block.memory.reference)
