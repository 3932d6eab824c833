"""The warpgroup of the logits and their softmax."""

from pallas_kernels.device import wgmma
from pallas_kernels.device.row_formats import TileAddress
from pallas_kernels.device.simt import Value, f32, i32, loop, opaque
from pallas_kernels.device.sync import Ring
from pallas_kernels.sparse_decode.narrow.block import Block
from pallas_kernels.sparse_decode.narrow.queries import load_query
from pallas_kernels.sparse_decode.narrow.softmax import Operands, Softmax


def scores(block: Block) -> None:
    """Writes the weights P of every block of keys, then the LSE and the outputs' factors."""
    load_query(block, 0)
    first, last = block.key_blocks(block.length())
    softmax = Softmax(block)
    address = block.format.address(block.thread, block.row_in_stage(), 0)
    query = wgmma.descriptor(block.query)
    block.query_ready.wait(0, i32(0))

    def step(number: Value, *carry: Value) -> list[Value]:
        state, ring = list(carry[:-2]), Ring(block.tuning.stages, *carry[-2:])
        pieces = block.pieces_from(ring)
        own = block.own_piece(pieces)
        block.full.wait(own.slot, own.phase)
        logits, operands = _logits(block, softmax, address, own.slot, opaque(query))
        block.scored.arrive_warp(own.slot, block.thread)
        state = softmax.weigh(logits, operands, own.slot, pieces[0].slot, number, state)
        return [*state, *pieces[-1].next().values()]

    start = [*softmax.start(), *Ring.start(block.tuning.stages).values()]
    carry = loop(first, last, start, step)
    # The values of the last block wait for a product that does not follow.
    end = block.pieces_from(Ring(block.tuning.stages, *carry[-2:]))
    block.scored.arrive_warp(block.own_piece(end).slot, block.thread)
    softmax.finish(carry[:-2])
    block.factor_ready.arrive_warp(0, block.thread)


def _logits(
    block: Block, softmax: Softmax, address: TileAddress, slot: Value, query: Value
) -> tuple[list[Value], Operands]:
    """K Q^T of this warp's 16 keys, without the factors of heads and rows."""
    row_format, eager = block.format, block.tuning.eager
    nope, rope = block.nope + slot * block.tile_bytes, block.rope + slot * block.weight_bytes
    tokens = block.tokens + slot * block.token_bytes

    last = row_format.parts  # the rotary part

    def load(part: int) -> list[list[Value]]:
        words = row_format.load_keys(rope if part == last else nope, address, part)
        if row_format.block_scales:
            rows = block.tuning.rows
            words.append(row_format.load_key_factors(tokens, address, softmax.row, part, rows))
        return words

    def decode(words: list[list[Value]], part: int) -> list[Value]:
        factors = words[2] if row_format.block_scales else None
        return row_format.key_fragments(words[:2], part, factors)

    fragments = decode(load(0), 0)
    words = load(1) if eager else []
    acc = [f32(0.0)] * (block.tuning.heads // 2)
    operands = None
    for part in range(last + 1):
        if part:
            fragments = wgmma.begin(fragments)
        else:
            fenced = wgmma.begin([*fragments, *acc])
            fragments, acc = fenced[:16], fenced[16:]
        for k in range(4):
            b = query + ((part * block.tuning.heads * wgmma.ROW_BYTES + 32 * k) >> 4)
            dtype = row_format.rope_dtype if part == last else row_format.dtype
            acc = wgmma.step(acc, fragments[4 * k : 4 * k + 4], b, dtype=dtype, b_is_k_major=True)
        wgmma.commit()
        if part < last:
            following = load(part + 2 if eager else part + 1) if part + eager < last else []
            if part:
                wgmma.wait(1, [])
            fragments = decode(words if eager else following, part + 1)
            words = following
        elif eager:
            operands = Operands(softmax, slot)
    acc = wgmma.wait(0, acc)
    return acc, operands or Operands(softmax, slot)
