"""The query in shared memory, as the right operand of the first product."""

import math

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import global_address, load_global, store_shared
from pallas_kernels.device.row_formats import PARTS, pack_bf16, pack_f16
from pallas_kernels.device.simt import Value, f32, i32, minimum, ptx, select, when
from pallas_kernels.device.sync import proxy_fence
from pallas_kernels.sparse_decode.block import CONSUMER_WARPS, Block, head_place

WIDTH_BYTES = 2 * 576
LANES_BYTES = 16
PIECES = WIDTH_BYTES // LANES_BYTES
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
    number = block.first_head + head
    exists = (head < block.tuning.heads) & (number < block.shape.heads)
    row = block.row.wide() * block.shape.heads + select(exists, number, i32(0)).wide()
    source = global_address(block.arrays["q"]) + row * WIDTH_BYTES
    pieces = [minimum(block.thread.lane + 32 * k, PIECES - 1) for k in range(3)]
    words = [load_global(source + (piece * LANES_BYTES).wide(), "rrrr") for piece in pieces]
    return [[select(exists, word, i32(0)) for word in piece] for piece in words]


def _store_head(block: Block, head: Value, words: list[list[Value]]) -> None:
    up = down = f32(1.0)
    if block.format.dtype == "f16":
        up, down = _powers(words)

    def store() -> None:
        for k, piece in enumerate(words):
            place = block.thread.lane + 32 * k
            if k < 2:
                _store_piece(block, head, place, piece, up, block.format.dtype)
            else:  # what is left for the first lanes is the rotary part

                def store_rope(place: Value = place, piece: list[Value] = piece) -> None:
                    _store_piece(block, head, place, piece, up, block.format.rope_dtype)

                when(place < PIECES, store_rope)
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
            word = pack((word << 16).as_f32() * up, (word & -65536).as_f32() * up)
        chunk = ((piece & 1) << 2) + i
        store_shared(tile + ((chunk ^ (head & 7)) << 4), [word])


def _store_constants(block: Block, head: Value, down: Value) -> None:
    (scale,) = load_global(global_address(block.arrays["sm_scale"]), "f")
    if block.shape.has_scale:
        scale = scale * load_global(global_address(block.arrays["scale"]), "f")[0]
    place = block.small + head_place(head, block.tuning.heads)
    store_shared(place, [scale * math.log2(math.e) * down], block.memory.scale)
    store_shared(place, [f32(NO_LOGIT)], block.memory.reference)


assert PIECES == 8 * (PARTS + 1)
