"""Joining the parts of a request's positions, of which there may be many."""

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.device.memory import global_address, load_global, store_global
from pallas_kernels.device.row_formats import RANK, pack_bf16
from pallas_kernels.device.simt import (
    WARP,
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
    out: Float[Array, "splits n h 512"], lse: Float[Array, "splits n h"]
) -> tuple[BFloat16[Array, "n h 512"], Float[Array, "n h"]]:
    """One softmax from those over its parts, in their order."""
    splits, n, heads, _ = out.shape

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, refs: Any, number: Any) -> None:
            _join_row([global_address(ref) for ref in refs], splits, n * heads, scalar(number))

        emit(tuple(refs), lax.axis_index("row"))

    joined, joined_lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((n, heads, RANK), jnp.bfloat16),
            jax.ShapeDtypeStruct((n, heads), jnp.float32),
        ),
        grid=(n * heads,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(out, lse)
    return joined, joined_lse


def _join_row(addresses: list[Value], splits: int, rows: int, row: Value) -> None:
    """One head of one token, by 128 threads: each has four columns, a lane a part's weight."""
    out, lse, joined, joined_lse = addresses
    thread = block_thread()
    lane, column = thread & (WARP - 1), thread.wide() * 4

    def place(part: Value) -> Value:
        return row.wide() + part.wide() * rows

    parts = [lane + WARP * k for k in range(math.ceil(splits / WARP))]
    own = [load_global(lse + place(minimum(p, splits - 1)) * 4, "f")[0] for p in parts]
    own = [select(p < splits, x, f32(-math.inf)) for p, x in zip(parts, own, strict=True)]
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

    values = [f32(0.0)] * 4
    for k, weight in enumerate(weights):
        count = min(WARP, splits - WARP * k)

        def step(number: Value, *carry: Value, k: int = k, weight: Value = weight) -> list[Value]:
            # Past the last part weights are 0; its values are read instead.
            lanes = [number * LOADS + i for i in range(LOADS)]
            places = [place(minimum(each + WARP * k, splits - 1)) for each in lanes]
            loaded = [load_global(out + (at * RANK + column) * 4, "ffff") for at in places]
            added = list(carry)
            for each, four in zip(lanes, loaded, strict=True):
                scaled = shuffle(weight, each)
                added = [fma(x, scaled, value) for x, value in zip(four, added, strict=True)]
            return added

        values = loop(0, i32(math.ceil(count / LOADS)), values, step)
    words = [pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3])]
    store_global(joined + (row.wide() * RANK + column) * 2, words)
    when(thread.equals(0), lambda: store_global(joined_lse + row.wide() * 4, [result]))
