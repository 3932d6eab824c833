"""The query in shared memory, as the left operand of the first product."""

from pallas_kernels.device import wgmma
from pallas_kernels.device.memory import store_shared
from pallas_kernels.device.simt import Value, f32, when
from pallas_kernels.device.sync import proxy_fence
from pallas_kernels.sparse_decode.heads import PIECE, load_head, logit_factor, powers, scaled
from pallas_kernels.sparse_decode.tuning import WIDE_HEADS
from pallas_kernels.sparse_decode.wide.block import (
    CONSUMER_WARPS,
    MEMORY,
    Block,
)


def load_query(block: Block, warpgroup: int) -> None:
    """By three warpgroups together: copies the heads of this block, a warp a head at a time.

    For e4m3 keys each head is scaled by a power of two, and all but the rotary part rounded to f16.
    """
    warp = block.thread.warp + 4 * warpgroup
    heads = [warp + CONSUMER_WARPS * k for k in range(-(-WIDE_HEADS // CONSUMER_WARPS))]
    # All at once: memory is as far away for one as for six.
    loaded = [load_head(block, head, WIDE_HEADS, block.format.width) for head in heads]
    for head, words in zip(heads, loaded, strict=True):

        def store(head: Value = head, words: list[list[Value]] = words) -> None:
            _store_head(block, head, words)

        when(head < WIDE_HEADS, store)
    proxy_fence()
    block.query_ready.arrive_warp(0, block.thread)


def _store_head(block: Block, head: Value, words: list[list[Value]]) -> None:
    row_format, down = block.format, f32(1.0)
    if row_format.dtype == "f16":
        up, down = powers(words)
        words = [scaled(piece, up, row_format.dtype) for piece in words[:2]] + [
            scaled(words[2], up, row_format.rope_dtype)
        ]
    for k, piece in enumerate(words):
        place = block.thread.lane + 32 * k
        chunk = (place & 7) ^ (head & 7)
        address = block.query_tile(place >> 3) + head * wgmma.ROW_BYTES + (chunk << 4)

        def store(address: Value = address, piece: list[Value] = piece) -> None:
            store_shared(address, piece)

        if k < 2:
            store()
        else:  # what is left for the first lanes is the rotary part
            when(place < block.format.width // PIECE, store)
    scale = logit_factor(block, down)
    place = block.small + head * 4
    when(block.thread.lane.equals(0), lambda: store_shared(place, [scale], MEMORY.decay))
