"""Sparse decode through the Hopper kernel of `pallas_kernels`: which calls it serves, and the call.

`pallas_kernels` is imported by the call and not by this module: importing Pallas takes as long as
importing the rest of jmla.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from jmla import _xla_attention
from jmla.layouts.base import KVLayout, Rows
from jmla.layouts.bf16 import BF16Rows
from jmla.layouts.block_scale import BlockScaleRows
from jmla.layouts.fp4 import FP4Rows
from jmla.layouts.fp8 import FP8Rows
from jmla.layouts.packed_block_scale import PackedBlockScaleRows
from jmla.layouts.paged_v4 import PagedV4Rows
from jmla.layouts.v4 import V4Rows

if TYPE_CHECKING:
    from pallas_kernels.sparse_decode import KeyList

ROPE_DIM = 64
LAYOUTS = tuple(KVLayout)
COPIED_BYTES = 16  # that the kernel copies at once, from where a multiple of them begins


class Queries(NamedTuple):
    """What each of `n` query tokens has of its own.

    Attributes:
        q: bf16 [n, h, width].
        indices: int32 [n, topk], for each cache.
        lengths: int32 [n] or None, for each cache.
    """

    q: BFloat16[Array, "n h width"]
    indices: tuple[Int[Array, "n topk"], ...]
    lengths: tuple[Int[Array, " n"] | None, ...]


class Shared(NamedTuple):
    """What all query tokens share: one or two caches, the factor on the logits, the sinks."""

    caches: tuple[Rows, ...]
    sm_scale: Float[Array, ""]
    attn_sink: Float[Array, " h"] | None


_Results = tuple[BFloat16[Array, "n h value"], Float[Array, "n h"]]


def unsupported_reasons(
    q: BFloat16[Array, "*tokens h width"], rows: Rows, extra_rows: Rows | None
) -> list[str]:
    """Why the kernels cannot serve a call of a sparse op; empty if they can.

    Args:
        q: the queries, of the shape that the op accepts.
        rows: the cache.
        extra_rows: the second cache, or None.
    """
    reasons = []
    if 0 in q.shape:
        reasons.append(f"{q.shape=}: the mosaic_gpu kernel expects at least one query")
    for name, cache in (("rows", rows), ("extra_rows", extra_rows)):
        if cache is None:
            continue
        problems = layout_reasons(cache.layout, cache.rank, cache.rope_dim)
        if cache.num_slots == 0:
            problems.append(f"the mosaic_gpu kernel expects at least one slot: {cache.shape=}")
        if isinstance(cache, PagedV4Rows) and cache.packed.shape[-1] % COPIED_BYTES:
            problems.append(
                f"the mosaic_gpu kernel expects a stride of pages that is a multiple of "
                f"{COPIED_BYTES} bytes: {cache.packed.shape=}"
            )
        reasons += [f"{name}: {problem}" for problem in problems]
    return reasons


def layout_reasons(layout: KVLayout, rank: int, rope_dim: int) -> list[str]:
    """Why the kernel cannot read a cache of this layout and these sizes; empty if it can."""
    if (rank, rope_dim) == (layout.default_rank, ROPE_DIM):
        return []
    return [
        f"the mosaic_gpu kernel reads {layout.name} latents of {layout.default_rank} + {ROPE_DIM} "
        f"values only, and these have {rank} + {rope_dim}"
    ]


def sparse_decode(
    q: BFloat16[Array, "b s_q h width"],
    rows: Rows,
    indices: Int[Array, "b s_q topk"],
    *,
    sm_scale: float | Float[Array, ""],
    topk_length: Int[Array, " b"] | Int[Array, "b s_q"] | None,
    attn_sink: Float[Array, " h"] | None,
    extra_rows: Rows | None,
    extra_indices: Int[Array, "b s_q extra_topk"] | None,
    extra_topk_length: Int[Array, " b"] | Int[Array, "b s_q"] | None,
    num_splits: int | None,
) -> tuple[BFloat16[Array, "b s_q h value"], Float[Array, "b s_q h"]]:
    """`jmla.sparse_decode` of arguments that `unsupported_reasons` has nothing against.

    vmap over the arguments of the queries alone (q, indices, lengths) makes them one larger batch;
    over any other argument it runs the kernel once for each element. Derivatives are computed by
    XLA, which repeats the attention for them.
    """
    batch = q.shape[:2]
    caches = [(rows, indices, topk_length)]
    if extra_rows is not None and extra_indices is not None:
        caches.append((extra_rows, extra_indices, extra_topk_length))
    n = math.prod(batch)
    queries = Queries(
        q.reshape(n, *q.shape[2:]),
        tuple(slots.reshape(n, slots.shape[2]) for _, slots, _ in caches),
        tuple(_per_query(lengths, batch) for *_, lengths in caches),
    )
    shared = Shared(
        tuple(cache for cache, *_ in caches), jnp.asarray(sm_scale, jnp.float32), attn_sink
    )
    out, lse = _compiled(queries, shared, num_splits)
    return out.reshape(*q.shape[:3], rows.value_dim), lse.reshape(q.shape[:3])


def _per_query(
    lengths: Int[Array, "..."] | None, batch: tuple[int, ...]
) -> Int[Array, " n"] | None:
    if lengths is None:
        return None
    missing = len(batch) - lengths.ndim
    wide = jnp.broadcast_to(lengths.reshape(lengths.shape + (1,) * missing), batch)
    return wide.reshape(math.prod(batch))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _attend(queries: Queries, shared: Shared, num_splits: int | None) -> _Results:
    return batchable(functools.partial(_launch, num_splits))(queries, shared)


@_attend.defjvp
def _with_derivatives_of_xla(
    num_splits: int | None, primals: tuple[Queries, Shared], tangents: tuple[Any, Any]
) -> tuple[_Results, _Results]:
    _, moved = jax.jvp(functools.partial(_by_xla, num_splits), primals, tangents)
    return _attend(*primals, num_splits), moved


def _by_xla(num_splits: int | None, queries: Queries, shared: Shared) -> _Results:
    lists = [
        _xla_attention.slot_list(cache, indices, lengths)
        for cache, indices, lengths in zip(
            shared.caches, queries.indices, queries.lengths, strict=True
        )
    ]
    return _xla_attention.decode(
        queries.q,
        lists,
        sm_scale=shared.sm_scale,
        attn_sink=shared.attn_sink,
        num_splits=num_splits,
    )


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_attend, static_argnums=2)


def batchable[Q, S, *R](launch: Callable[[Q, S], tuple[*R]]) -> Callable[[Q, S], tuple[*R]]:
    """A kernel's launch, whose results have an axis of queries, with a rule for vmap.

    vmap over the queries alone makes them more queries; over anything else, one launch each.
    """

    @jax.custom_batching.custom_vmap
    def call(queries: Q, shared: S) -> tuple[*R]:
        return launch(queries, shared)

    @call.def_vmap
    def over_axis(
        axis_size: int,
        in_batched: tuple[Any, Any],
        queries: Q,
        shared: S,
    ) -> tuple[tuple[*R], tuple[bool, ...]]:
        is_batched = jax.tree.leaves(in_batched)
        if axis_size == 0 or any(jax.tree.leaves(in_batched[1])):
            leaves, tree = jax.tree.flatten((queries, shared))

            def call_one(moving: list[Array]) -> tuple[*R]:
                own = iter(moving)
                pairs = zip(leaves, is_batched, strict=True)
                mixed = [next(own) if moves else x for x, moves in pairs]
                return call(*jax.tree.unflatten(tree, mixed))

            moving = [x for x, moves in zip(leaves, is_batched, strict=True) if moves]
            results = jax.lax.map(call_one, moving)
            return results, (True,) * len(results)

        def merged(x: Array, moves: bool) -> Array:
            x = x if moves else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        results = call(jax.tree.map(merged, queries, in_batched[0]), shared)
        apart = tuple(x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]) for x in results)
        return apart, (True,) * len(apart)

    return call


def _launch(num_splits: int | None, queries: Queries, shared: Shared) -> _Results:
    from pallas_kernels import sparse_decode as kernels

    results = kernels.sparse_decode(
        queries.q,
        key_lists(queries, shared),
        sm_scale=shared.sm_scale,
        attn_sink=shared.attn_sink,
        num_splits=num_splits,
    )
    return results.out, results.lse


def key_lists(queries: Queries, shared: Shared) -> "list[KeyList]":
    """The caches as the kernels take them, under jit: outside of it a reshape copies the cache."""
    from pallas_kernels.sparse_decode import KeyList

    caches = [cache.flat() for cache in shared.caches]
    return [
        KeyList(
            format=format_name(cache),
            arrays=arrays_of(cache),
            indices=indices,
            lengths=lengths,
            page_size=cache.page_size if isinstance(cache, PagedV4Rows) else None,
        )
        for cache, indices, lengths in zip(caches, queries.indices, queries.lengths, strict=True)
    ]


def format_name(rows: Rows) -> str:
    """What `pallas_kernels` calls the format of rows that it reads."""
    match rows:
        case BF16Rows():
            return "bf16"
        case FP4Rows():
            return "fp4"
        case V4Rows():
            return "v4"
        case PagedV4Rows():
            return "paged_v4"
        case FP8Rows():
            return "fp8"
        case BlockScaleRows():
            return f"block_scale_{rows.scale_format}"
        case PackedBlockScaleRows():
            return f"packed_block_scale_{rows.scale_format}"
    raise AssertionError(f"{type(rows)=}: expected rows of one of {LAYOUTS}")


def arrays_of(rows: Rows) -> dict[str, Array]:
    """The arrays of a cache under their names, which are the kernel's."""
    arrays = {name: getattr(rows, name) for name in rows.token_leaves}
    if isinstance(rows, FP8Rows) and rows.scale is not None:
        arrays["scale"] = rows.scale
    return arrays
