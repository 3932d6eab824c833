"""A kind of block, and its launch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.device.boxes import Arrays

_REGISTERS = 65536 // 128  # of a thread of each warpgroup, in sum


@dataclasses.dataclass(frozen=True)
class Program:
    """One kind of block, for one format of rows.

    Attributes:
        heads: of a query that one block serves.
        shared: the arrays in shared memory and their bytes.
        block: the block as one thread sees it, from the launch's shape, references to the arrays
            in shared and in global memory, and its number in the grid; it has `initialise`.
        roles: registers per thread and code of each warpgroup. The registers are multiples of 8,
            in sum at most 512, and at most what a launch gives, a multiple of 8, for each: more
            would stop the kernel for ever.
        cluster: neighbouring blocks that run at the same time and can write to one another's
            shared memory. If there are more than one, the block has `leave`, too.
        begin: what every warpgroup does first, once the block is initialised.
    """

    heads: int
    shared: Mapping[str, int]
    block: Callable[[Any, Any, Any, Any], Any]
    roles: Sequence[tuple[int, Callable[[Any], None]]]
    cluster: int = 1
    begin: Callable[[Any], None] = lambda block: None


def launch(
    program: Program,
    shape: Any,
    operands: Mapping[str, Array],
    results: Mapping[str, jax.ShapeDtypeStruct],
    *,
    blocks: int,
) -> dict[str, Array]:
    """Runs a grid of blocks.

    Args:
        program: of the blocks.
        shape: what the launch computes, for `program.block`.
        operands: the arrays that blocks read, under the names they know them by.
        results: the arrays that they write.
        blocks: of the grid, a multiple of the program's clusters.
    """
    names = [*operands, *results]
    # A cluster of one block is not the same as none: it takes longer to start.
    cluster: dict[str, Any] = {}
    if program.cluster > 1:
        cluster = {"cluster": (program.cluster,), "cluster_names": ("part",)}
    initial = _REGISTERS // len(program.roles) // 8 * 8

    def kernel(*refs: Any) -> None:
        arrays = dict(zip(names, refs, strict=False))
        shared = dict(zip(program.shared, refs[len(names) :], strict=True))
        number = lax.axis_index("block")
        if program.cluster > 1:
            number = number * program.cluster + lax.axis_index("part")

        def run(code: Callable[[Any], None]) -> None:
            @plgpu.inline_mgpu(
                arg_types=(
                    {name: plgpu.RefType() for name in shared},
                    {name: plgpu.RefType() for name in arrays},
                    plgpu.Layout.WG_SPLAT,
                )
            )
            def emit(context: Any, shared: Any, arrays: Any, number: Any) -> None:
                code(program.block(shape, shared, Arrays(context, arrays), number))

            emit(shared, arrays, number)

        def role(warpgroup: int, registers: int, code: Callable[[Any], None]) -> None:
            @pl.when(lax.axis_index("warpgroup") == warpgroup)
            def _() -> None:
                if registers > initial:
                    plgpu.set_max_registers(registers, action="increase")
                else:
                    plgpu.set_max_registers(registers, action="decrease")

                def begin(block: Any) -> None:
                    program.begin(block)
                    code(block)

                run(begin)

        run(lambda block: block.initialise())
        for warpgroup, (registers, code) in enumerate(program.roles):
            role(warpgroup, registers, code)
        if program.cluster > 1:
            run(lambda block: block.leave())

    call = plgpu.kernel(
        kernel,
        out_type=tuple(results.values()),
        # One axis: the others end at 65535.
        grid=(blocks // program.cluster,),
        grid_names=("block",),
        num_threads=len(program.roles),
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((size // 4,), jnp.int32) for size in program.shared.values()],
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **cluster,
    )
    return dict(zip(results, call(*operands.values()), strict=True))
