"""Writing, reading and converting cache rows by the Hopper kernel of `pallas_kernels`.

`pallas_kernels` is imported by the calls and not by this module: importing Pallas takes as long as
importing the rest of jmla.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmla import _implementation
from jmla.layouts.base import TokenRows
from jmla.layouts.bf16 import BF16Rows
from jmla.layouts.bf16_index_keys import BF16IndexKeyRows
from jmla.layouts.block_scale import BlockScaleRows
from jmla.layouts.fp4 import FP4Rows
from jmla.layouts.fp8 import FP8Rows
from jmla.layouts.index_keys import IndexKeyRows
from jmla.layouts.packed_block_scale import PackedBlockScaleRows
from jmla.layouts.paged_index_keys import PagedIndexKeyRows
from jmla.layouts.paged_v4 import PagedV4Rows
from jmla.layouts.rewrite import rewrite as rewrite_by_xla
from jmla.layouts.v4 import V4Rows
from jmla.raw_latents import RawLatents

if TYPE_CHECKING:
    from pallas_kernels import cache_codec

CacheImplementation = Literal["mosaic_gpu", "xla"]
"""The code that writes or converts rows; None in its place means the best that serves the call."""

_Latents = Float[Array, "n width"]
_INDEX_DIMS = (8, 16, 32, 64, 128, 256)


def takes_kernel(
    implementation: CacheImplementation | None, reasons: Callable[[], list[str]]
) -> bool:
    """Whether the kernel runs a call; `reasons` against it are found where they matter.

    Raises:
        NotImplementedError: it is asked for and cannot.
        ValueError: an unknown implementation.
    """
    asked = implementation == "mosaic_gpu" or (
        implementation is None and _implementation.on_hopper()
    )
    return (
        _implementation.choose(implementation, reasons() if asked else [], ("xla",)) == "mosaic_gpu"
    )


def unsupported_reasons(
    *tokens: TokenRows | _Latents | RawLatents, empty: bool = False, host: bool = False
) -> list[str]:
    """Why the kernel cannot read or write these rows; none if it can.

    Args:
        tokens: rows of any token axes, index keys, or latents, raw or not.
        empty: whether there may be no rows.
        host: whether they may be in pinned host memory, too.
    """
    found = []
    for each in tokens:
        named = isinstance(each, TokenRows | RawLatents)
        name = type(each).__name__ if named else "latents"
        if isinstance(each, IndexKeyRows | PagedIndexKeyRows) and each.dim not in _INDEX_DIMS:
            found.append(f"{name}: {each.dim=}: the mosaic_gpu kernel expects one of {_INDEX_DIMS}")
            continue
        problems = _format(each).problems()
        found += [f"{name}: {problem}" for problem in problems]
        if not isinstance(each, TokenRows):
            continue
        if each.num_slots == 0 and not empty:
            found.append(f"{name}: the mosaic_gpu kernel expects at least one slot: {each.shape=}")
        leaves = (getattr(each, leaf) for leaf in each.token_leaves)
        if not host and any(map(_in_host_memory, leaves)):
            found.append(f"{name}: the mosaic_gpu kernel expects rows in device memory")
    return found


def store(
    targets: tuple[TokenRows, ...],
    slots: Int[Array, " n"],
    sources: tuple[_Latents | RawLatents, ...],
    *,
    kernel: bool,
) -> tuple[Any, ...]:
    """Rows, or rows and index keys, with tokens stored at their slots, in their formats.

    Args:
        targets: rows of any token axes.
        slots: int32, the same for all targets; one outside a target is dropped.
        sources: latents for each target, raw or not.
        kernel: whether the kernel does it, in one launch, of arguments that `unsupported_reasons`
            has nothing against; else XLA does. Under vmap XLA does in any case. The kernel has no
            derivatives.
    """
    run = _compiled_store if kernel and slots.size else _store_by_xla
    return tuple(run(targets, slots, sources))


def _store_by_xla(targets: Any, slots: Any, sources: Any) -> Any:
    # Its package imports this module.
    from jmla.hisparse.host_memory import write_rows

    latents = [each.prepared() if isinstance(each, RawLatents) else each for each in sources]
    return tuple(
        write_rows(target, slots, target.encode(each))
        for target, each in zip(targets, latents, strict=True)
    )


def _in_host_memory(leaf: Array) -> bool:
    return bool(jax.typeof(leaf).memory_space == jax.memory.Space.Host)


@jax.custom_batching.custom_vmap
def _store(targets: Any, slots: Any, sources: Any) -> Any:
    from pallas_kernels import cache_codec

    stored = cache_codec.transcode(
        [(_side(a), _side(b)) for a, b in zip(sources, targets, strict=True)],
        rows=slots.size,
        target_slots=slots,
        written=[tuple(target.token_leaves) for target in targets],
    )
    # Merged here, under jit: outside of it every reshape is a copy of the cache.
    return tuple(
        dataclasses.replace(target.flat(), **leaves)
        .reshape(*target.shape)
        .map_tokens(in_memory_of, target)
        for target, leaves in zip(targets, stored, strict=True)
    )


def in_memory_of(leaf: Array, like: Array) -> Array:
    """What a kernel has made of an array in place, in JAX's types where that array is."""
    # A reference is frozen as an array of the device, wherever it is. Nothing moves.
    return jax.device_put(leaf, jax.memory.Space.Host) if _in_host_memory(like) else leaf


@_store.def_vmap
def _store_over_axis(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
    return over_axis(_store_by_xla, axis_size, in_batched, arguments)


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled_store = jax.jit(_store)


def over_axis(function: Any, axis_size: int, in_batched: Any, arguments: Any) -> Any:
    """A rule of `custom_vmap` by another function: its results, of which each leaf is batched."""
    axes = tuple(jax.tree.map(lambda moves: 0 if moves else None, each) for each in in_batched)
    results = jax.vmap(function, in_axes=axes, axis_size=axis_size)(*arguments)
    return results, jax.tree.map(lambda _: True, results)


def rewrite(
    source: TokenRows | _Latents, form: TokenRows, slots: Int[Array, "..."] | None = None
) -> Any:
    """`jmla.layouts.rewrite` of arguments that `unsupported_reasons` has nothing against.

    Under vmap, and for derivatives, it is done by XLA.
    """
    shape = source.shape if isinstance(source, TokenRows) else source.shape[:-1]
    shape = shape if slots is None else slots.shape
    if 0 in shape:
        return rewrite_by_xla(source, form, slots)
    return _compiled(source, form, slots)


@jax.custom_batching.custom_vmap
def _launch(source: Any, form: Any, slots: Any) -> Any:
    from pallas_kernels import cache_codec

    shape = source.shape if isinstance(source, TokenRows) else source.shape[:-1]
    shape = shape if slots is None else slots.shape
    before, after = _side(source), _side(form)
    rows = math.prod(shape)
    leaves = {
        name: jax.ShapeDtypeStruct((rows, *per_token), dtype)
        for name, (per_token, dtype) in form.token_leaves.items()
    }
    (stored,) = cache_codec.transcode(
        [(before, dataclasses.replace(after, arrays={**after.arrays, **leaves}))],
        rows=rows,
        source_slots=None if slots is None else slots.reshape(rows),
        written=[tuple(leaves)],
    )
    return dataclasses.replace(form, **stored).reshape(*shape)


@_launch.def_vmap
def _launch_over_axis(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
    return over_axis(rewrite_by_xla, axis_size, in_batched, arguments)


@jax.custom_jvp
def _rewrite(source: Any, form: Any, slots: Any) -> Any:
    return _launch(source, form, slots)


@_rewrite.defjvp
def _with_derivatives_of_xla(primals: Any, tangents: Any) -> Any:
    _, moved = jax.jvp(rewrite_by_xla, primals, tangents)
    return _rewrite(*primals), moved


_compiled = jax.jit(_rewrite)


def _side(tokens: TokenRows | Array | RawLatents) -> "cache_codec.Side":
    """The tokens as the kernel takes them."""
    from pallas_kernels import cache_codec

    if isinstance(tokens, RawLatents):
        arrays = {"latents": tokens.values, "gain": tokens.gain}
        arrays |= {"cos": tokens.cos, "sin": tokens.sin}
        return cache_codec.Side(_format(tokens), arrays, tokens.shape[0])
    if not isinstance(tokens, TokenRows):
        latents = tokens.reshape(-1, tokens.shape[-1])
        return cache_codec.Side(_format(tokens), {"latents": latents}, latents.shape[0])
    flat = tokens.flat()
    arrays = {name: getattr(flat, name) for name in flat.token_leaves}
    if isinstance(flat, FP8Rows) and flat.scale is not None:
        arrays["scale"] = flat.scale.reshape(1)
    return cache_codec.Side(_format(tokens), arrays, flat.num_slots)


def _format(tokens: TokenRows | Array | RawLatents) -> "cache_codec.Format":
    """What the kernel calls the format of these tokens."""
    from pallas_kernels import cache_codec

    match tokens:
        case BF16Rows():
            return cache_codec.latents(tokens.width)
        case FP8Rows():
            return cache_codec.fp8(tokens.width, scaled=tokens.scale is not None)
        case BlockScaleRows() | PackedBlockScaleRows():
            return cache_codec.block_scale(
                tokens.rank,
                tokens.rope_dim,
                pow2=tokens.scale_format == "pow2",
                packed=isinstance(tokens, PackedBlockScaleRows),
            )
        case FP4Rows():
            return cache_codec.fp4(tokens.width)
        case V4Rows():
            return cache_codec.v4(tokens.rank, tokens.rope_dim)
        case PagedV4Rows():
            size = tokens.page_size or 1
            pages = cache_codec.Pages(size, tokens.packed.shape[-1])
            return cache_codec.v4(tokens.rank, tokens.rope_dim, pages=pages)
        case IndexKeyRows():
            return cache_codec.index_keys(tokens.dim, pow2=tokens.scale_format == "pow2")
        case BF16IndexKeyRows():
            return cache_codec.latents(tokens.dim, "keys")
        case PagedIndexKeyRows():
            pages = cache_codec.Pages(tokens.page_size or 1, tokens.packed.shape[-1])
            pow2 = tokens.scale_format == "pow2"
            return cache_codec.index_keys(tokens.dim, pow2=pow2, pages=pages)
        case RawLatents():
            return cache_codec.raw_latents(
                tokens.rank,
                2 * tokens.cos.shape[-1],
                eps=tokens.eps,
                interleaved=tokens.interleaved,
                f32=tokens.values.dtype == jnp.float32,
                f32_gain=tokens.gain.dtype == jnp.float32,
            )
        case TokenRows():
            raise AssertionError(f"{type(tokens)=}: expected rows of a layout, or index keys")
        case _:
            return cache_codec.latents(tokens.shape[-1], f32=tokens.dtype == jnp.float32)
