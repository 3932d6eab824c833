"""Latents to rows, rows to bytes, and one layout to another.

`implementation` of what computes here is "mosaic_gpu", a kernel for Hopper (compute capability
9.0); "xla"; or None, the kernel where JAX's default device is a Hopper and the kernel serves the
call. Both give the same bytes, but for the sign and the payload of NaN. Under vmap, and for
derivatives, the kernel's work is done by XLA.
"""

import dataclasses

import jax
from jaxtyping import Array, BFloat16, Float, Int, UInt8

from jmla._mosaic_cache import CacheImplementation, takes_kernel, unsupported_reasons
from jmla._mosaic_cache import rewrite as rewrite_by_kernel
from jmla.layouts._bits import check_unpaged
from jmla.layouts.base import KVLayout, Rows, ScaleFormat, check_latents, check_slots, page_slots
from jmla.layouts.bf16 import BF16Rows
from jmla.layouts.block_scale import BlockScaleRows
from jmla.layouts.fp4 import FP4Rows
from jmla.layouts.fp8 import FP8Rows
from jmla.layouts.packed_block_scale import PackedBlockScaleRows
from jmla.layouts.paged_v4 import PagedV4Rows
from jmla.layouts.rewrite import keeps_codes, rewrite
from jmla.layouts.v4 import V4Rows


def zero_rows(
    layout: KVLayout,
    shape: tuple[int, ...],
    *,
    rank: int | None = None,
    rope_dim: int = 64,
    scale_format: ScaleFormat = "pow2",
    scale: Array | float | None = None,
) -> Rows:
    """Rows of zeros with token axes `shape`.

    Args:
        layout: how a row is stored.
        shape: the token axes, e.g. `(pages, page_size)`.
        rank: number of no-position values; None takes the layout's default (448 for FP8_V4, else
            512).
        rope_dim: number of rotary values.
        scale_format: which scales a block may have; only the block-scale layout looks at it.
        scale: the scale of the whole tensor, for FP8_NOPE_FP8_ROPE alone; None is exactly 1.

    Raises:
        ValueError: the layout is not defined for the rank or rope width, or has no such scale.
    """
    rank = layout.default_rank if rank is None else rank
    if scale is not None and layout is not KVLayout.FP8_NOPE_FP8_ROPE:
        raise ValueError(f"{scale=}: expected None, {layout.name} has no scale for the tensor")
    match layout:
        case KVLayout.BF16:
            return BF16Rows.zeros(shape, rank=rank, rope_dim=rope_dim)
        case KVLayout.FP8_NOPE_FP8_ROPE:
            return FP8Rows.zeros(shape, rank=rank, rope_dim=rope_dim, scale=scale)
        case KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE:
            return BlockScaleRows.zeros(
                shape, rank=rank, rope_dim=rope_dim, scale_format=scale_format
            )
        case KVLayout.FP4:
            return FP4Rows.zeros(shape, rank=rank, rope_dim=rope_dim)
        case KVLayout.FP8_V4:
            return V4Rows.zeros(shape, rank=rank, rope_dim=rope_dim)


def quantize(
    latents: Float[Array, "*tokens width"],
    layout: KVLayout,
    *,
    rank: int | None = None,
    rope_dim: int = 64,
    scale_format: ScaleFormat = "pow2",
    scale: Array | float | None = None,
    implementation: CacheImplementation | None = None,
) -> Rows:
    """Latents in `layout`, with arithmetic in f32.

    Args:
        latents: bf16 or f32 `[..., rank + rope_dim]`.
        layout: how a row is stored; its row class says what becomes of NaN and infinity.
        rank: number of no-position values; None takes what `rope_dim` leaves of the last axis.
        rope_dim: number of rotary values.
        scale_format: "pow2" for FlashMLA's rule, "fp32" for SGLang's; only the block-scale layout
            looks at it.
        scale: the scale of the whole tensor, for FP8_NOPE_FP8_ROPE alone; None is exactly 1.
        implementation: see the module.

    Returns:
        Rows of token shape `latents.shape[:-1]`.

    Raises:
        ValueError: another dtype or width, or one for which the layout is not defined.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    if latents.ndim == 0:
        raise ValueError(f"{latents.shape=}: expected [..., rank + rope_dim]")
    rank = latents.shape[-1] - rope_dim if rank is None else rank
    form = zero_rows(
        layout, (0,), rank=rank, rope_dim=rope_dim, scale_format=scale_format, scale=scale
    )
    check_latents(latents, form.width)
    return _rewritten(latents, form, None, implementation)


def dequantize(
    rows: Rows,
    *,
    slots: Int[Array, "..."] | None = None,
    pages: Int[Array, "..."] | None = None,
    implementation: CacheImplementation | None = None,
) -> BFloat16[Array, "*tokens width"]:
    """The latents of `rows`: an f32 product, rounded once to bf16.

    Args:
        rows: of any token axes.
        slots: int32 of any shape, the rows to take; a slot outside `[0, num_slots)` gives zeros.
            None takes all.
        pages: in place of slots, int32 of any shape, the pages to take; see `convert`.
        implementation: see the module.

    Returns:
        bf16, with the token axes of `rows`, of `slots`, or of `pages` and a page.

    Raises:
        ValueError: rows that are not sound, or slots or pages that are not int32.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    rows.check()
    slots = _chosen_slots(rows, slots, pages)
    if isinstance(rows, BF16Rows) and slots is None:
        return rows.latents
    form = BF16Rows.zeros((0,), rank=rows.rank, rope_dim=rows.rope_dim)
    return _rewritten(rows, form, slots, implementation).dequantize()


def to_bytes(rows: Rows, *, page_bytes: int | None = None) -> UInt8[Array, "*tokens bytes"]:
    """The packed rows that other engines store, exactly.

    Args:
        rows: rows of any token shape. For FP8_V4 the last token axis is a page, and whole split
            pages `[..., page_bytes]` come back; for the others `[*tokens, bytes_per_token]`.
        page_bytes: the stride of an FP8_V4 page. None rounds up to a multiple of 576.

    Raises:
        ValueError: `page_bytes` for another layout, or too small for a page.
    """
    rows.check()
    return rows.pack(page_bytes=page_bytes)


def from_bytes(
    packed: UInt8[Array, "*tokens bytes"],
    layout: KVLayout,
    *,
    rank: int | None = None,
    rope_dim: int = 64,
    scale_format: ScaleFormat = "pow2",
    page_size: int | None = None,
    scale: Array | float | None = None,
    in_place: bool = False,
) -> Rows:
    """The reverse of `to_bytes`, exact.

    Args:
        packed: u8 `[*tokens, bytes_per_token]`; for FP8_V4 pages `[..., page_bytes]` of any stride
            that holds a page.
        layout: how the rows were stored.
        rank: number of no-position values; None takes the layout's default (448 for FP8_V4, else
            512).
        rope_dim: number of rotary values.
        scale_format: by which rule a block-scale cache was written; bytes do not tell.
        page_size: tokens in a page, for FP8_V4 alone, where it is required.
        scale: the scale of the whole tensor, for FP8_NOPE_FP8_ROPE alone; None is exactly 1.
        in_place: the rows hold `packed` itself and are unpacked as they are read, so that a cache
            that another engine keeps is never copied. For the block-scale layout, and for FP8_V4,
            whose rows stay in their pages; the rows of BF16 and FP8_NOPE_FP8_ROPE are one array in
            either form.

    Raises:
        ValueError: not u8, a last axis of another length, or arguments that are not the layout's.
    """
    form = zero_rows(
        layout, (0,), rank=rank, rope_dim=rope_dim, scale_format=scale_format, scale=scale
    )
    if in_place:
        if isinstance(form, V4Rows):
            return PagedV4Rows.like(form, packed, page_size)
        check_unpaged(layout, page_size)
        if isinstance(form, BlockScaleRows):
            return PackedBlockScaleRows.like(form, packed)
        raise ValueError(
            f"{in_place=}: expected False for {layout.name}, which has no rows that stay packed"
        )
    return form.unpack(packed, page_size=page_size)


def convert(
    rows: Rows,
    layout: KVLayout,
    *,
    slots: Int[Array, "..."] | None = None,
    pages: Int[Array, "..."] | None = None,
    scale_format: ScaleFormat | None = None,
    scale: Array | float | None = None,
    implementation: CacheImplementation | None = None,
) -> Rows:
    """The same latents in another layout, for the whole cache or for chosen slots.

    FP8_NOPE_FP8_ROPE to block scale keeps each no-position byte, NaN codes included, and widens
    the rotary part: a cache without a scale gets block scales 1, so nothing is rounded; a cache
    with a scale gets that scale in each block. FP8_NOPE_FP8_ROPE to itself keeps codes and scale
    unless another `scale` is given. The same layout and format gives the same rows. Every other
    pair dequantises and quantises.

    Args:
        rows: the source; packed ones are unpacked first.
        layout: the target; rank and rope width stay.
        slots: int32 of any shape; the result has token shape `slots.shape`, and a slot outside
            `[0, num_slots)` gives zeros. None converts all rows and keeps the token shape.
        pages: in place of slots, int32 of any shape, such as a page table, for rows of token shape
            (pages, page_size): the result has token shape `(*pages.shape, page_size)`, and a page
            that does not exist, such as -1, is not read and gives zeros.
        scale_format: of a block-scale target; None keeps that of a block-scale source, else "pow2".
            Power-of-two scales are f32 scales as they stand; the other way requantises.
        scale: of an FP8_NOPE_FP8_ROPE target; None keeps the source's if that is of this layout.
        implementation: see the module.

    Raises:
        ValueError: the target is not defined for the source's rank, or scales cannot be expressed.
        NotImplementedError: the named implementation cannot serve the call; all reasons are given.
    """
    rows.check()
    slots = _chosen_slots(rows, slots, pages)
    if isinstance(rows, BlockScaleRows | PackedBlockScaleRows):
        scale_format = scale_format or rows.scale_format
    form = zero_rows(
        layout,
        (0,),
        rank=rows.rank,
        rope_dim=rows.rope_dim,
        scale_format=scale_format or "pow2",
        scale=scale,
    )
    if isinstance(rows, FP8Rows) and isinstance(form, FP8Rows) and scale is None:
        if slots is None:
            return rows
        codes = dataclasses.replace(rows, scale=None)
        taken = _rewritten(codes, form, slots, implementation)
        assert isinstance(taken, FP8Rows)
        return dataclasses.replace(taken, scale=rows.scale)
    if isinstance(rows, FP8Rows) and isinstance(form, BlockScaleRows):
        _check_block_scales(rows, form)
    ours: object = jax.tree.structure(form)
    if slots is None and keeps_codes(rows, form) and jax.tree.structure(rows) == ours:
        return rows
    return _rewritten(rows, form, slots, implementation)


def _chosen_slots(
    rows: Rows, slots: Int[Array, "..."] | None, pages: Int[Array, "..."] | None
) -> Int[Array, "..."] | None:
    if pages is not None:
        if slots is not None or len(rows.shape) != 2:
            raise ValueError(
                f"{rows.shape=}: expected rows of token shape (pages, page_size) for pages, and no "
                "slots beside them; use rows.reshape(-1, page_size)"
            )
        return page_slots(pages, *rows.shape)
    if slots is not None:
        check_slots(slots)
    return slots


def _rewritten(
    source: Rows | Float[Array, "*tokens width"],
    form: Rows,
    slots: Int[Array, "..."] | None,
    implementation: CacheImplementation | None,
) -> Rows:
    kernel = takes_kernel(implementation, lambda: _reasons(source, form))
    return (rewrite_by_kernel if kernel else rewrite)(source, form, slots)


def _reasons(source: Rows | Float[Array, "*tokens width"], form: Rows) -> list[str]:
    return unsupported_reasons(source) + unsupported_reasons(form, empty=True)


def _check_block_scales(rows: FP8Rows, form: BlockScaleRows) -> None:
    if rows.scale is not None and form.scale_format == "pow2":
        raise ValueError(
            f"scale_format='pow2' with {rows.scale=}: expected 'fp32', because the blocks take the "
            "scale of the tensor, whose value need not be a power of two and is not known at trace "
            "time; pass scale_format='fp32', or rows without a scale"
        )
