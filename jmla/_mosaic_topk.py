"""Top-k through the Hopper kernel of `pallas_kernels`: which calls it serves, and the call.

`pallas_kernels` is imported by the call and not by this module: importing Pallas takes as long as
importing the rest of jmla.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jmla._index_transforms import paged_indices, ragged_indices

LARGEST_K = 4096
MOST_COLUMNS = 1 << 20


class _Windows(NamedTuple):
    """What is selected from.

    Attributes:
        scores: f32 [rows, s].
        lengths: int32 [rows].
        starts: int32 [rows] or None.
    """

    scores: Float[Array, "rows s"]
    lengths: Int[Array, " rows"]
    starts: Int[Array, " rows"] | None


class _Pages(NamedTuple):
    """Where slots come from; `requests` None: row `i` is of request `i`."""

    page_table: Int[Array, "requests pages"]
    requests: Int[Array, " rows"] | None


class _Offsets(NamedTuple):
    """Where a row's tokens begin in a ragged buffer."""

    offsets: Int[Array, " rows"]


_Conversion = _Pages | _Offsets | None


def unsupported_reasons(shape: tuple[int, ...], k: int) -> list[str]:
    """Why the kernel cannot select `k` scores from rows of that shape; empty if it can."""
    reasons = []
    if 0 in shape:
        reasons.append(f"scores.shape={shape}: the mosaic_gpu kernel expects at least one score")
    if shape[1] > MOST_COLUMNS:
        reasons.append(
            f"scores.shape={shape}: the mosaic_gpu kernel takes rows of at most {MOST_COLUMNS}"
        )
    if k > LARGEST_K:
        reasons.append(f"{k=}: the mosaic_gpu kernel selects at most {LARGEST_K}")
    return reasons


def select_topk(
    scores: Float[Array, "rows s"],
    lengths: Int[Array, " rows"],
    k: int,
    starts: Int[Array, " rows"] | None,
) -> Int32[Array, "rows k"]:
    """`jmla.select_topk` of arguments that `unsupported_reasons` has nothing against.

    vmap makes a larger batch of rows of it, and the same is true of the other functions here.
    """
    return _compiled(_Windows(scores, lengths, starts), None, k, 1)


def select_paged_indices(
    scores: Float[Array, "rows s"],
    lengths: Int[Array, " rows"],
    k: int,
    starts: Int[Array, " rows"] | None,
    page_table: Int[Array, "requests pages"],
    page_size: int,
    requests: Int[Array, " rows"] | None,
) -> Int32[Array, "rows k"]:
    """`jmla.select_paged_indices` of the same; the page table is not empty."""
    windows = _Windows(scores, lengths, starts)
    return _compiled(windows, _Pages(page_table, requests), k, page_size)


def select_ragged_indices(
    scores: Float[Array, "rows s"],
    lengths: Int[Array, " rows"],
    k: int,
    starts: Int[Array, " rows"] | None,
    offsets: Int[Array, " rows"],
) -> Int32[Array, "rows k"]:
    """`jmla.select_ragged_indices` of the same."""
    return _compiled(_Windows(scores, lengths, starts), _Offsets(offsets), k, 1)


def _select(windows: _Windows, conversion: _Conversion, k: int, page_size: int) -> Array:
    # Positions have no derivatives, and the kernel has no rule for any.
    scores = jax.lax.stop_gradient(windows.scores)
    return _batchable(k, page_size)(windows._replace(scores=scores), conversion)


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_select, static_argnums=(2, 3))


def _batchable(k: int, page_size: int) -> Any:
    """The kernel's call as a function of arrays, with a rule for vmap."""

    @jax.custom_batching.custom_vmap
    def call(windows: _Windows, conversion: _Conversion) -> Array:
        return _launch(windows, conversion, k, page_size)

    @call.def_vmap
    def over_axis(
        axis_size: int, in_batched: tuple[Any, Any], windows: _Windows, conversion: _Conversion
    ) -> tuple[Array, bool]:
        if axis_size == 0:
            return jnp.zeros((0, windows.lengths.shape[-1], k), jnp.int32), True

        def merged(x: Array, moves: bool) -> Array:
            x = x if moves else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        positions = call(jax.tree.map(merged, windows, in_batched[0]), None)
        positions = positions.reshape(axis_size, positions.shape[0] // axis_size, k)
        convert = functools.partial(_convert, page_size)
        axes = jax.tree.map(lambda moves: 0 if moves else None, in_batched[1])
        return jax.vmap(convert, in_axes=(0, axes))(positions, conversion), True

    return call


def _convert(page_size: int, positions: Array, conversion: _Conversion) -> Array:
    match conversion:
        case _Pages(page_table, requests):
            return paged_indices(positions, page_table, page_size=page_size, requests=requests)
        case _Offsets(offsets):
            return ragged_indices(positions, offsets)
    return positions


def _launch(windows: _Windows, conversion: _Conversion, k: int, page_size: int) -> Array:
    from pallas_kernels import select_topk as kernels

    target: Any = None
    operands: dict[str, Array] = {}
    match conversion:
        case _Pages(page_table, requests):
            target = kernels.PagedSlots(
                page_size=page_size,
                requests=page_table.shape[0],
                max_pages=page_table.shape[1],
                own_request=requests is None,
            )
            operands["page_table"] = page_table
            if requests is not None:
                operands["requests"] = requests
        case _Offsets(offsets):
            target = kernels.RaggedRows()
            operands["offsets"] = offsets
    return kernels.select_topk(
        windows.scores,
        windows.lengths,
        k,
        starts=windows.starts,
        conversion=target,
        operands=operands,
    )
