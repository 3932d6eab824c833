"""The launch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.device.memory import global_address
from pallas_kernels.device.simt import WARPGROUP, scalar
from pallas_kernels.index_query.row import prepare
from pallas_kernels.index_query.shape import Shape


def index_query(
    shape: Shape, operands: Mapping[str, Array]
) -> tuple[Float8e4m3fn[Array, "tokens heads dim"], Float[Array, "tokens heads"]]:
    """Queries in e4m3, and head weights times the scales of these.

    Args:
        shape: of the launch.
        operands: `q`, bf16 or f32 [tokens, heads, dim]; `weights`, f32 [tokens, heads]; where
            there is a `rope_dim`, `cos` and `sin`, f32 [tokens, rope_dim / 2].
    """
    results = (
        jax.ShapeDtypeStruct((shape.tokens, shape.heads, shape.dim), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((shape.tokens, shape.heads), jnp.float32),
    )
    names = (*operands, "codes", "scaled")

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, refs: Any, number: Any) -> None:
            addresses = dict(zip(names, map(global_address, refs), strict=True))
            prepare(shape, addresses, scalar(number) * WARPGROUP)

        emit(tuple(refs), lax.axis_index("block"))

    codes, scaled = plgpu.kernel(
        kernel,
        out_type=results,
        # One axis: the others end at 65535.
        grid=(-(-shape.rows * shape.lanes // WARPGROUP),),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands.values())
    return codes, scaled
