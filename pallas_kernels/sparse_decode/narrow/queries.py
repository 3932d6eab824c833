"""The query in shared memory, as the right operand of the first product."""

import math
from collections.abc import Callable

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import store_shared
from pallas_kernels.device.row_formats import ROPE_DIM
from pallas_kernels.device.simt import (
    Value,
    f32,
    select,
    when,
)
from pallas_kernels.device.sync import proxy_fence
from pallas_kernels.sparse_decode.heads import (
    NO_LOGIT,
    PIECE,
    load_head,
    logit_factor,
    powers,
    scaled,
)
from pallas_kernels.sparse_decode.narrow.block import CONSUMER_WARPS, Block, head_place


def load_query(block: Block, warpgroup: int) -> None:
    """By three warpgroups together: copies the heads of this block, a warp a head at a time.

    For e4m3 keys the query is multiplied in f16, after each head was scaled by a power of two,
    which is exact but for values 2^29 times smaller than the head's largest. Columns are in the
    order of `RowFormat.load_keys`.
    """
    warp = block.thread.warp + 4 * warpgroup
    rounds = math.ceil(block.tuning.heads / CONSUMER_WARPS)
    heads = [warp + CONSUMER_WARPS * k for k in range(rounds)]
    # All at once: memory is as far away for one as for six.
    loaded = [load_head(block, head, block.tuning.heads, block.format.width) for head in heads]
    for head, words in zip(heads, loaded, strict=True):
        _store_head(block, head, words)
    proxy_fence()
    block.query_ready.arrive_warp(0, block.thread)


def _store_head(block: Block, head: Value, words: list[list[Value]]) -> None:
    up = down = f32(1.0)
    if block.format.dtype == "f16":
        up, down = powers(words)

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


def _store_piece(
    block: Block, head: Value, piece: Value, words: list[Value], up: Value, dtype: str
) -> None:
    part, thread_column = piece >> 3, (piece & 7) >> 1
    row = block.query + (head >> 3) * wgmma.ATOM_BYTES + (head & 7) * wgmma.ROW_BYTES
    tile = row + part * (block.tuning.heads * wgmma.ROW_BYTES) + thread_column * 4
    if block.format.dtype == "f16":
        words = scaled(words, up, dtype, block.format.partner)
    # Lanes of different parts store different words at a time, for their banks to differ.
    for bit in range(2):
        turned = [words[(i + (1 << bit)) % 4] for i in range(4)]
        turns = (part & (1 << bit)).equals(1 << bit)
        words = [select(turns, b, a) for a, b in zip(words, turned, strict=True)]
    for i, word in enumerate(words):
        chunk = ((piece & 1) << 2) + ((part + i) & 3)
        store_shared(tile + ((chunk ^ (head & 7)) << 4), [word])


def _store_constants(block: Block, head: Value, down: Value) -> None:
    place = block.small + head_place(head, block.tuning.heads)
    store_shared(place, [logit_factor(block, down)], block.memory.scale)
    store_shared(place, [f32(NO_LOGIT)], block.memory.reference)
