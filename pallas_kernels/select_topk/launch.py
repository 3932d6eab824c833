"""A grid of blocks, or of clusters of blocks, that each take a row."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.device.memory import global_address, shared_address
from pallas_kernels.device.simt import Value, i32, scalar
from pallas_kernels.select_topk.block import Block
from pallas_kernels.select_topk.shape import Shape
from pallas_kernels.select_topk.tuning import WARPGROUP


def launch_rows(
    shape: Shape,
    operands: Mapping[str, Array],
    sizes: Mapping[str, int],
    row: Callable[[Block, Value], None],
    *,
    threads: int,
    blocks: int = 1,
) -> Array:
    """Runs the code of a row for all rows.

    Args:
        shape: of the launch; its result is int32 [rows, k].
        operands: the arrays that blocks read, under the names they know them by.
        sizes: words of each part of a block's shared memory.
        row: the code of a block, which is given its number among those of its row.
        threads: of a block.
        blocks: of a row.
    """
    names = (*operands, "out")

    def kernel(*refs: Any) -> None:
        place = [lax.axis_index(axis) for axis in ("row", *cluster.get("cluster_names", ()))]

        @plgpu.inline_mgpu(
            arg_types=(
                [plgpu.RefType() for _ in names],
                plgpu.RefType(),
                [plgpu.Layout.WG_SPLAT for _ in place],
            )
        )
        def emit(_: Any, arrays: Any, shared: Any, place: Sequence[Any]) -> None:
            addresses = dict(zip(names, map(global_address, arrays), strict=True))
            part = scalar(place[1]) if len(place) > 1 else i32(0)
            base = shared_address(shared)
            row(Block.of(shape, threads, sizes, base, addresses, scalar(place[0])), part)

        emit(list(refs[: len(names)]), refs[len(names)], place)

    # A cluster of one block is not the same as none: it takes longer to start.
    cluster: dict[str, Any] = {}
    if blocks > 1:
        cluster = {"cluster": (blocks,), "cluster_names": ("part",)}
    (out,) = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((shape.rows, shape.k), jnp.int32),),
        # One axis: the others end at 65535.
        grid=(shape.rows,),
        grid_names=("row",),
        num_threads=threads // WARPGROUP,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((sum(sizes.values()),), jnp.int32)],
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **cluster,
    )(*operands.values())
    return out
