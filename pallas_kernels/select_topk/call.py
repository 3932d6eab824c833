"""The launch."""

import functools
from collections.abc import Mapping

from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.device.simt import Value, i32, when
from pallas_kernels.select_topk.block import BINS, HEADER, Block
from pallas_kernels.select_topk.emit import write_first
from pallas_kernels.select_topk.filter import select_filtered
from pallas_kernels.select_topk.launch import launch_rows
from pallas_kernels.select_topk.resident import select_resident
from pallas_kernels.select_topk.shape import PagedSlots, RaggedRows, Shape
from pallas_kernels.select_topk.tuning import Resident, Tuning, choose


def select_topk(
    scores: Float[Array, "rows columns"],
    lengths: Int[Array, " rows"],
    k: int,
    *,
    starts: Int[Array, " rows"] | None = None,
    conversion: PagedSlots | RaggedRows | None = None,
    operands: Mapping[str, Array] | None = None,
    tuning: Tuning | None = None,
) -> Int32[Array, "rows k"]:
    """The ascending positions of the k largest scores of each window, or what they stand for.

    NaN is less than all other scores, and of equal ones the first are taken.

    Args:
        scores: f32 [rows, columns], at least one of each and at most `MOST_COLUMNS` columns.
        lengths: int32 [rows], of each window, clipped to the row. One of no more than k is taken
            whole.
        k: at most `LARGEST_K`.
        starts: int32 [rows], of each window, clipped to the row; None: 0.
        conversion: what positions become; None leaves them.
        operands: the arrays that the conversion names.
        tuning: None chooses by the shapes.

    Returns:
        int32 [rows, k]; -1 after the last.
    """
    rows, columns = scores.shape
    shape = Shape(rows, columns, k, starts is not None, conversion)
    given = {"scores": scores, "lengths": lengths, **(operands or {})}
    if starts is not None:
        given["starts"] = starts
    tuning = tuning or choose(shape)
    sizes = {
        "header": HEADER,
        "histogram": BINS,
        "bits": shape.words(tuning.threads),
        "kept": 2 * tuning.capacity,
    }
    return launch_rows(
        shape,
        {name: given[name] for name in shape.operands},
        sizes,
        functools.partial(_select_row, tuning),
        threads=tuning.threads,
        blocks=tuning.blocks,
    )


def _select_row(tuning: Tuning, block: Block, part: Value) -> None:
    whole = i32(block.shape.k) >= block.window.length
    when(whole & part.equals(0), lambda: write_first(block))
    if isinstance(tuning, Resident):
        when(whole ^ 1, lambda: select_resident(block, tuning))
    else:
        when(whole ^ 1, lambda: select_filtered(block, tuning, part))
