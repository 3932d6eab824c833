"""Where a step's new tokens of one request go, and what its buffer forgets for them."""

from functools import partial

from pallas_kernels.device.memory import load_global, store_global
from pallas_kernels.device.simt import Value, i32, minimum, select, when
from pallas_kernels.hot_buffer.block import Block


def place_request(block: Block, count: int) -> None:
    """Makes the request's last `count` tokens resident; their host rows and device rows, or -1."""
    shape = block.shape
    (length,) = load_global(block.arrays["seq_lens"] + block.request.wide() * 4, "r")
    tokens = block.row("tokens", shape.slots)
    first = length - count

    # Later positions are drafts that were rejected, or are written now.
    slots = [block.thread + i for i in range(0, shape.slots, block.threads)]
    places = [tokens + minimum(slot, shape.slots - 1).wide() * 4 for slot in slots]
    held = [load_global(place, "r", cache="")[0] for place in places]
    for slot, place, token in zip(slots, places, held, strict=True):
        stale = ((token >= first) | (slot >= shape.size)) & (slot < shape.slots)
        when(stale & (length > 0), partial(store_global, place, [i32(-1)]))
    block.sync()

    def put(nth: Value) -> None:
        position = first + nth
        host = block.host_row(position)
        slot = select(length < shape.size + 1, position, nth + shape.size)
        slot = select(host > -1, slot, i32(-1))
        row = block.buffer_row_of(slot)
        when(slot > -1, lambda: store_global(tokens + slot.wide() * 4, [position]))
        for name, found in (("host_slots", host), ("rows", row)):
            store_global(block.row(name, count) + nth.wide() * 4, [found])

    block.every(count, put)
