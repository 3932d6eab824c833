"""Joining the parts of a request's positions, of which there may be many."""

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.device.memory import global_address, load_global, store_global
from pallas_kernels.device.row_formats import pack_bf16
from pallas_kernels.device.simt import (
    WARP,
    WARPGROUP,
    Value,
    block_thread,
    divide,
    exp2,
    f32,
    fma,
    fmax,
    i32,
    log2,
    loop,
    minimum,
    scalar,
    select,
    shuffle,
    shuffle_xor,
    when,
)

LOADS = 8  # that are under way together


def join(
    out: Float[Array, "splits n h dim"], lse: Float[Array, "splits n h"]
) -> tuple[BFloat16[Array, "n h dim"], Float[Array, "n h"]]:
    """One softmax from those over its parts, in their order; `dim` is 64, 128, 256 or 512."""
    splits, n, heads, dim = out.shape
    parts = _Parts(splits, n * heads, dim)

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, refs: Any, number: Any) -> None:
            _join_row([global_address(ref) for ref in refs], parts, scalar(number))

        emit(tuple(refs), lax.axis_index("block"))

    joined, joined_lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((n, heads, dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((n, heads), jnp.float32),
        ),
        grid=(math.ceil(parts.rows / parts.rows_of_a_block),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(out, lse)
    return joined, joined_lse


class _Parts(NamedTuple):
    """What is joined: so many parts of so many rows of `dim` values."""

    splits: int
    rows: int
    dim: int

    @property
    def columns(self) -> int:
        """Of a thread: what one access takes, or less if a warp has more lanes."""
        return min(4, self.dim // WARP)

    @property
    def rows_of_a_block(self) -> int:
        """A warp has one row or a part of one."""
        return WARPGROUP * self.columns // self.dim


def _join_row(addresses: list[Value], parts: _Parts, block: Value) -> None:
    """Some rows, by 128 threads: each has some columns, a lane a part's weight."""
    out, lse, joined, joined_lse = addresses
    splits, rows, columns = parts.splits, parts.rows, parts.columns
    kinds, threads = "f" * columns, parts.dim // columns
    index = block_thread()
    lane, column = index & (WARP - 1), (index % threads).wide() * columns
    own_row = block * parts.rows_of_a_block + index // threads
    row = minimum(own_row, rows - 1)

    def place(part: Value) -> Value:
        return row.wide() + part.wide() * rows

    mine = [lane + WARP * k for k in range(math.ceil(splits / WARP))]
    own = [load_global(lse + place(minimum(p, splits - 1)) * 4, "f")[0] for p in mine]
    own = [select(p < splits, x, f32(-math.inf)) for p, x in zip(mine, own, strict=True)]
    top = own[0]
    for x in own[1:]:
        top = fmax(top, x)
    for mask in (1, 2, 4, 8, 16):
        top = fmax(top, shuffle_xor(top, mask))
    nothing = top.equals(-math.inf)
    base = select(nothing, f32(0.0), top)
    weights = [exp2((x - base) * math.log2(math.e)) for x in own]
    total = weights[0]
    for x in weights[1:]:
        total = total + x
    for mask in (1, 2, 4, 8, 16):
        total = total + shuffle_xor(total, mask)
    result = select(nothing, f32(-math.inf), base + log2(total) * math.log(2.0))
    factor = select(nothing, f32(0.0), divide(f32(1.0), total))
    weights = [weight * factor for weight in weights]

    values = [f32(0.0)] * columns
    for k, weight in enumerate(weights):
        count = min(WARP, splits - WARP * k)

        def step(number: Value, *carry: Value, k: int = k, weight: Value = weight) -> list[Value]:
            # Past the last part weights are 0; its values are read instead.
            lanes = [number * LOADS + i for i in range(LOADS)]
            places = [place(minimum(each + WARP * k, splits - 1)) for each in lanes]
            loaded = [load_global(out + (at * parts.dim + column) * 4, kinds) for at in places]
            added = list(carry)
            for each, some in zip(lanes, loaded, strict=True):
                scaled = shuffle(weight, each)
                added = [fma(x, scaled, value) for x, value in zip(some, added, strict=True)]
            return added

        values = loop(0, i32(math.ceil(count / LOADS)), values, step)
    words = [pack_bf16(values[i], values[i + 1]) for i in range(0, columns, 2)]

    def store() -> None:
        store_global(joined + (row.wide() * parts.dim + column) * 2, words)
        when(column.equals(0), lambda: store_global(joined_lse + row.wide() * 4, [result]))

    when(own_row < rows, store)
