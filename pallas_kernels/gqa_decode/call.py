"""The launches of a call."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.device.join import join
from pallas_kernels.gqa_decode.attend import attend
from pallas_kernels.gqa_decode.block import Block, shared_bytes
from pallas_kernels.gqa_decode.formats import HeadFormat, format_of
from pallas_kernels.gqa_decode.shape import MAX_SPLITS, Shape, Tuning, choose_splits, tuning_for


class HeadPages(NamedTuple):
    """The contexts of `b` requests, in pages of a cache with some heads.

    Attributes:
        format: "bf16", "fp8" or "fp4".
        arrays: `keys` and `values` of [pages, page_size, kv_heads, values of a head as they are
            stored]; for FP8 `key_scale` and `value_scale`, f32 [1]; for FP4 `key_scales` and
            `value_scales`, a byte for each 16 values: [pages, page_size, kv_heads * head_dim / 16].
        table: int32 [b, max_pages]; a page outside the cache is masked.
        lengths: int32 [b], positions of each request.
    """

    format: str
    arrays: Mapping[str, Array]
    table: Int[Array, "b max_pages"]
    lengths: Int[Array, " b"]


def gqa_decode(
    q: BFloat16[Array, "b s_q h dim"],
    pages: HeadPages,
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool,
    num_splits: int | None,
) -> tuple[BFloat16[Array, "b s_q h dim"], Float[Array, "b s_q h"]]:
    """Attention of the last tokens of each request to its positions: out, and lse.

    Args:
        q: bf16 [b, s_q, h, dim]; h is a multiple of the heads of the cache, no axis is empty.
        pages: of the requests.
        sm_scale: factor on the logits.
        causal: whether a token attends to positions up to its own alone.
        num_splits: parts of each request; None chooses by the shapes.
    """
    requests, tokens, heads, dim = q.shape
    num_pages, page_size, kv_heads, _ = pages.arrays["keys"].shape
    row_format = format_of(pages.format, dim)
    rows = tokens * heads // kv_heads
    tuning = tuning_for(row_format.stored_bytes, rows)
    longest = pages.table.shape[1] * page_size
    tiles = -(-rows // tuning.rows)
    if num_splits is None:
        splits = choose_splits(
            requests * tokens * heads,
            requests * kv_heads * tiles,
            longest,
            row_format.stored_bytes,
            dim,
            tuning,
        )
    else:
        splits = min(num_splits, -(-longest // tuning.block_keys), MAX_SPLITS)
    shape = Shape(
        requests=requests,
        tokens=tokens,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head_dim=dim,
        num_pages=num_pages,
        page_size=page_size,
        max_pages=pages.table.shape[1],
        causal=causal,
        splits=splits,
    )
    operands = {
        "q": q,
        "page_table": pages.table,
        "seq_lens": pages.lengths,
        "sm_scale": jnp.asarray(sm_scale, jnp.float32).reshape(1),
        **pages.arrays,
    }
    blocks = requests * kv_heads * tiles * splits
    out, lse = _launch(row_format, tuning, shape, operands, blocks)
    if splits > 1:
        out, lse = join(out, lse)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _launch(
    row_format: HeadFormat,
    tuning: Tuning,
    shape: Shape,
    operands: Mapping[str, Array],
    blocks: int,
) -> tuple[Array, Array]:
    """out [splits, b, s_q * h, dim], in f32 if it is yet to be joined, and lse."""
    names = [*operands, "out", "lse"]
    sizes = shared_bytes(row_format, tuning)
    parts = (shape.splits, shape.requests, shape.tokens * shape.heads)
    dtype = jnp.bfloat16 if shape.splits == 1 else jnp.float32

    def kernel(*refs: Any) -> None:
        arrays = dict(zip(names, refs, strict=False))
        shared = dict(zip(sizes, refs[len(names) :], strict=True))

        @plgpu.inline_mgpu(
            arg_types=(
                {name: plgpu.RefType() for name in shared},
                {name: plgpu.RefType() for name in arrays},
                plgpu.Layout.WG_SPLAT,
            )
        )
        def emit(_: Any, shared: Any, arrays: Any, number: Any) -> None:
            attend(Block(row_format, tuning, shape, shared, arrays, number))

        emit(shared, arrays, lax.axis_index("block"))

    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((*parts, shape.head_dim), dtype),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((size // 4,), jnp.int32) for size in sizes.values()],
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands.values())
    return out, lse
