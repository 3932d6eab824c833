"""What every kind of block does for a head: takes its query, and ends its softmax."""

import math

from pallas_kernels.device.memory import global_address, load_global, store_global
from pallas_kernels.device.row_formats import pack_bf16, pack_f16
from pallas_kernels.device.simt import (
    WARP,
    Thread,
    Value,
    divide,
    exp2,
    f32,
    i32,
    log2,
    maximum_s16,
    minimum,
    ptx,
    select,
    when,
)
from pallas_kernels.sparse_decode.task import Task

PIECE = 8  # values of a query that a lane takes at a time
TOP_EXPONENT = 14  # a head's largest value is below 2^15, near the end of f16
EXPONENTS = 0x7F80  # of a bf16
NO_LOGIT = -1e30  # a reference below every logit
# A head's reference is raised when a weight would pass 2^14, to where the largest is 2^6: far
# enough below the end of f16 to be raised seldom, and small weights keep their precision.
LARGEST_WEIGHT = 14.0
RAISED_WEIGHT = 6.0


def load_head(task: Task, head: Value, heads: int, width: int) -> list[list[Value]]:
    """This lane's pieces of 8 values of the head; zeros if it is not one of the block's `heads`."""
    count = width // PIECE
    number = task.first_head + head
    exists = (head < heads) & (number < task.shape.heads)
    row = task.row.wide() * task.shape.heads + select(exists, number, i32(0)).wide()
    source = global_address(task.arrays["q"]) + row * (2 * width)
    rounds = math.ceil(count / WARP)
    lane = Thread.current().lane
    pieces = [minimum(lane + WARP * k, count - 1) for k in range(rounds)]
    words = [load_global(source + (piece * (2 * PIECE)).wide(), "rrrr") for piece in pieces]
    return [[select(exists, word, i32(0)) for word in piece] for piece in words]


def powers(words: list[list[Value]]) -> tuple[Value, Value]:
    """2^k that brings the head's largest value to the top of f16, and 2^-k.

    A head with an infinity has no other results than NaN, whatever becomes of its finite values.
    """
    pairs = i32(0)
    for piece in words:
        for word in piece:
            pairs = maximum_s16(pairs, word & (EXPONENTS << 16 | EXPONENTS))
    low, high = pairs & 0xFFFF, pairs >> 16
    top = select(low < high, high, low)
    (top,) = ptx("redux.sync.max.s32 $0, $1, -1;", top, out="r", convergent=True)
    bits = minimum(i32(127 + TOP_EXPONENT + 127) - (top >> 7), 254)
    return (bits << 23).as_f32(), ((i32(254) - bits) << 23).as_f32()


def scaled(words: list[Value], factor: Value, dtype: str, partner: int = 1) -> list[Value]:
    """Eight bf16 times the factor, in `dtype`; the two of a word are `partner` columns apart."""
    pack = pack_f16 if dtype == "f16" else pack_bf16
    firsts = (0, 2, 4, 6) if partner == 1 else (0, 1, 2, 3)
    return [
        pack(_widened(words, i) * factor, _widened(words, i + partner) * factor) for i in firsts
    ]


def _widened(words: list[Value], i: int) -> Value:
    """The i-th bf16 of some words, as a float."""
    word = words[i // 2]
    return ((word & -65536) if i % 2 else (word << 16)).as_f32()


def logit_factor(task: Task, down: Value) -> Value:
    """From sums of products to logarithms of base 2, for a head that was scaled by 1 / `down`."""
    (scale,) = load_global(global_address(task.arrays["sm_scale"]), "f")
    if task.shape.has_scale:
        scale = scale * load_global(global_address(task.arrays["scale"]), "f")[0]
    return scale * math.log2(math.e) * down


def finish_head(
    task: Task, head: Value, reference: Value, total: Value, top: Value | None, writes: Value
) -> Value:
    """Stores the LSE and the largest logit of one of the block's heads; the factor on its output.

    Args:
        task: of the block.
        head: its number in the block.
        reference: the logarithm of base 2 whose weight is 1.
        total: the sum of weights.
        top: the largest of its logits that are numbers, as a logarithm of base 2, or None.
        writes: whether this thread stores.
    """
    shape = task.shape
    empty = total.equals(0.0)
    lse = select(empty, f32(-math.inf), reference + log2(total))
    number = task.first_head + head

    def store() -> None:
        place = task.result_row(number) * 4
        store_global(global_address(task.arrays["lse"]) + place, [lse * math.log(2.0)])
        if top is not None:
            # A logit that is no number shows in the sum.
            largest = select(total.equals(total), top * math.log(2.0), total)
            store_global(global_address(task.arrays["max_logits"]) + place, [largest])

    when(writes & (number < shape.heads), store)
    factor = divide(f32(1.0), total)
    if shape.has_sink:
        safe = minimum(number, shape.heads - 1)
        (sink,) = load_global(global_address(task.arrays["sink"]) + safe.wide() * 4, "f")
        factor = factor * divide(f32(1.0), exp2(sink * math.log2(math.e) - lse) + 1.0)
    if shape.has_scale:
        factor = factor * load_global(global_address(task.arrays["scale"]), "f")[0]
    return select(empty, f32(0.0), factor)
