"""The launch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.device.memory import global_address, shared_address
from pallas_kernels.device.simt import Value, i32, scalar, when
from pallas_kernels.select_topk.block import BINS, HEADER, Block
from pallas_kernels.select_topk.emit import write_first
from pallas_kernels.select_topk.filter import select_filtered
from pallas_kernels.select_topk.resident import select_resident
from pallas_kernels.select_topk.shape import PagedSlots, RaggedRows, Shape
from pallas_kernels.select_topk.tuning import WARPGROUP, Resident, Tuning, choose


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
    given = {"scores": scores, "lengths": lengths, "starts": starts, **(operands or {})}
    return _launch(shape, tuning or choose(shape), [given[name] for name in shape.operands])


def _launch(shape: Shape, tuning: Tuning, operands: list[Any]) -> Array:
    names = (*shape.operands, "out")
    sizes = {
        "header": HEADER,
        "histogram": BINS,
        "bits": shape.words(tuning.threads),
        "kept": 2 * tuning.capacity,
    }

    def kernel(*refs: Any) -> None:
        place = [lax.axis_index(axis) for axis in ("row", *cluster.get("cluster_names", ()))]

        @plgpu.inline_mgpu(
            arg_types=(
                [plgpu.RefType() for _ in names],
                plgpu.RefType(),
                [plgpu.Layout.WG_SPLAT for _ in place],
            )
        )
        def emit(_: Any, arrays: Any, shared: Any, place: Any) -> None:
            addresses = dict(zip(names, map(global_address, arrays), strict=True))
            part = scalar(place[1]) if len(place) > 1 else i32(0)
            base = shared_address(shared)
            block = Block.of(shape, tuning.threads, sizes, base, addresses, scalar(place[0]))
            _select_row(block, tuning, part)

        emit(list(refs[: len(names)]), refs[len(names)], place)

    # A cluster of one block is not the same as none: it takes longer to start.
    cluster: dict[str, Any] = {}
    if tuning.blocks > 1:
        cluster = {"cluster": (tuning.blocks,), "cluster_names": ("part",)}
    (out,) = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((shape.rows, shape.k), jnp.int32),),
        # One axis: the others end at 65535.
        grid=(shape.rows,),
        grid_names=("row",),
        num_threads=tuning.threads // WARPGROUP,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((sum(sizes.values()),), jnp.int32)],
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **cluster,
    )(*operands)
    return out


def _select_row(block: Block, tuning: Tuning, part: Value) -> None:
    whole = i32(block.shape.k) >= block.window.length
    when(whole & part.equals(0), lambda: write_first(block))
    if isinstance(tuning, Resident):
        when(whole ^ 1, lambda: select_resident(block, tuning))
    else:
        when(whole ^ 1, lambda: select_filtered(block, tuning, part))
