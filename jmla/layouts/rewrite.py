"""Rows of one form as rows of another, by XLA: what the kernels do in its place."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jmla.layouts.base import BLOCK_SCALE_TILE, Rows, TokenRows
from jmla.layouts.block_scale import BlockScaleRows
from jmla.layouts.fp8 import FP8Rows
from jmla.layouts.packed_block_scale import PackedBlockScaleRows
from jmla.layouts.paged_index_keys import PagedIndexKeyRows
from jmla.layouts.paged_v4 import PagedV4Rows

Latents = Float[Array, "*tokens width"]


def rewrite(source: TokenRows | Latents, form: TokenRows, slots: Int[Array, "..."] | None) -> Any:
    """Latents, or rows, in the form of `form`, whose data is not used.

    Args:
        source: bf16 or f32 latents, or rows. Index keys stay as they are.
        form: of the same rank and rope width, and not packed.
        slots: int32, of rows alone: those to take. A slot outside gives zeros. None takes all.

    Returns:
        Rows with the token axes of the source, or of the slots.
    """
    if not isinstance(source, TokenRows):
        return form.encode(source)
    if slots is not None:
        source = source.gather(slots)
    if isinstance(source, PagedIndexKeyRows):
        source = source.unpacked()
    if not isinstance(source, Rows) or not isinstance(form, Rows):
        return dataclasses.replace(form, **_leaves(source))
    if isinstance(source, PackedBlockScaleRows | PagedV4Rows):
        source = source.unpacked()
    if isinstance(source, FP8Rows) and isinstance(form, BlockScaleRows):
        return _fp8_to_block_scale(source, form)
    if keeps_codes(source, form):
        return dataclasses.replace(form, **_leaves(source))
    return form.encode(source.dequantize())


def keeps_codes(source: Rows, form: Rows) -> bool:
    """Whether rows of the one form are those of the other as they are stored."""
    if isinstance(source, FP8Rows) and isinstance(form, FP8Rows):
        return source.scale is None and form.scale is None
    if isinstance(source, BlockScaleRows | PackedBlockScaleRows) and isinstance(
        form, BlockScaleRows
    ):
        # A power of two is an f32 scale as it stands.
        return source.scale_format in (form.scale_format, "pow2")
    return source.layout is form.layout


def _leaves(tokens: TokenRows) -> dict[str, Any]:
    return {name: getattr(tokens, name) for name in tokens.token_leaves}


def _fp8_to_block_scale(rows: FP8Rows, form: BlockScaleRows) -> BlockScaleRows:
    scale: Float32[Array, ""] = jnp.float32(1) if rows.scale is None else rows.scale
    blocks = rows.rank // BLOCK_SCALE_TILE
    rope = dataclasses.replace(rows, values=rows.values[..., rows.rank :], rank=0)
    return dataclasses.replace(
        form,
        nope=rows.values[..., : rows.rank],
        scales=jnp.broadcast_to(scale, (*rows.shape, blocks)),
        rope=rope.dequantize(),
    )
