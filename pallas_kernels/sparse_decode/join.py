"""Joining the parts of a query's keys: a kernel, because XLA takes several to do it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.device.memory import global_address, load_global, store_global
from pallas_kernels.device.row_formats import RANK, pack_bf16
from pallas_kernels.device.simt import (
    Value,
    block_thread,
    divide,
    exp2,
    f32,
    fma,
    fmax,
    log2,
    scalar,
    select,
    when,
)

LOG2_E = math.log2(math.e)
LOADS = 8


def join(
    parts: Sequence[tuple[Float[Array, "splits n h 512"], Float[Array, "splits n h"]]],
    attn_sink: Float[Array, " h"] | None,
) -> tuple[BFloat16[Array, "n h 512"], Float[Array, "n h"]]:
    """One softmax from those over its parts, in their order, with the sinks."""
    _, n, heads, _ = parts[0][0].shape
    arrays = [array for pair in parts for array in pair]
    sinks = [] if attn_sink is None else [attn_sink]
    splits = [out.shape[0] for out, _ in parts]

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, refs: Any, number: Any) -> None:
            _join_row([global_address(ref) for ref in refs], splits, n * heads, heads, number)

        emit(tuple(refs), lax.axis_index("row"))

    out, lse = plgpu.kernel(
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
    )(*arrays, *sinks)
    return out, lse


def _join_row(
    addresses: Sequence[Value], splits: Sequence[int], rows: int, heads: int, number: Any
) -> None:
    """One head of one query, by 128 threads: each has four columns."""
    row, thread = scalar(number), block_thread()
    *inputs, out_address, lse_address = addresses
    pairs = [(inputs[2 * i], inputs[2 * i + 1]) for i in range(len(splits))]
    column = thread.wide() * 4

    lses, outs = [], []
    for (out, lse), count in zip(pairs, splits, strict=True):
        for part in range(count):
            place = row.wide() + part * rows
            lses += load_global(lse + place * 4, "f")
            outs.append(out + (place * RANK + column) * 4)

    top = functools.reduce(fmax, lses)
    nothing = top.equals(-math.inf)
    base = select(nothing, f32(0.0), top)
    weights = [exp2((lse - base) * LOG2_E) for lse in lses]
    total = functools.reduce(lambda a, b: a + b, weights)
    lse = select(nothing, f32(-math.inf), base + log2(total) * math.log(2.0))
    factor = divide(f32(1.0), total)
    if len(inputs) > 2 * len(splits):
        (sink,) = load_global(inputs[-1] + (row % heads).wide() * 4, "f")
        factor = factor * divide(f32(1.0), exp2((sink - lse) * LOG2_E) + 1.0)
    factor = select(nothing, f32(0.0), factor)

    values = [f32(0.0)] * 4
    for first in range(0, len(outs), LOADS):
        # Together, so that they are under way together.
        loaded = [load_global(address, "ffff") for address in outs[first : first + LOADS]]
        for weight, four in zip(weights[first : first + LOADS], loaded, strict=True):
            scaled = weight * factor
            # A part without keys has weight 0, and zeros.
            values = [fma(x, scaled, value) for x, value in zip(four, values, strict=True)]
    words = [pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3])]
    store_global(out_address + (row.wide() * RANK + column) * 2, words)
    when(thread.equals(0), lambda: store_global(lse_address + row.wide() * 4, [lse]))
