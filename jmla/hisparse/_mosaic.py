"""Swaps, fetches and writes of host-resident caches through the Hopper kernels.

`pallas_kernels` is imported by the calls and not by this module: importing Pallas takes as long as
importing the rest of jmla.
"""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Int, Int32

from jmla._mosaic_cache import in_memory_of, over_axis
from jmla.hisparse.host_memory import copy_by_xla
from jmla.hisparse.lru import Planned, plan_by_xla
from jmla.hisparse.placement import place_new as place_by_xla
from jmla.hisparse.residency import Residency
from jmla.layouts.base import TokenRows

HiSparseImplementation = Literal["mosaic_gpu", "xla"]
"""The code that swaps and moves rows; None in its place means the best that serves the call."""


def swap_reasons(residency: Residency, positions: int) -> list[str]:
    """Why the kernel cannot swap in that many positions of each request; none if it can."""
    from pallas_kernels import hot_buffer

    return hot_buffer.problems(_shape(residency, positions))


def plan_swap(
    residency: Residency, positions: Int[Array, "requests n"], seq_lens: Int[Array, " requests"]
) -> Planned:
    """The LRU rule of `jmla.hisparse.plan_swap`, of what `swap_reasons` has nothing against.

    Under vmap it is done by XLA.
    """
    return _compiled_plan(residency, positions, seq_lens)


def swap_rows[T: TokenRows](
    residency: Residency,
    host_rows: T,
    buffer_rows: T,
    positions: Int[Array, "requests n"],
    seq_lens: Int[Array, " requests"],
) -> tuple[Residency, Int32[Array, "requests n"], T]:
    """`plan_swap` and `copy_rows` in one kernel; under vmap by XLA.

    Returns:
        The residency after the step, the device row of each position, and the buffer's rows.
    """
    given = residency, host_rows, buffer_rows, positions, seq_lens
    tokens, lru, slots, rows = _compiled_swap(*given)
    return dataclasses.replace(residency, tokens=tokens, lru=lru), slots, rows


def place_new(
    residency: Residency, seq_lens: Int[Array, " requests"], count: int
) -> tuple[Residency, Int32[Array, "requests count"], Int32[Array, "requests count"]]:
    """`jmla.hisparse.placement.place_new`; under vmap by XLA."""
    tokens, host_slots, rows = _compiled_place(residency, seq_lens, count)
    return dataclasses.replace(residency, tokens=tokens), host_slots, rows


def copy_reasons(*tokens: TokenRows) -> list[str]:
    """Why the kernel cannot copy rows between these; none if it can."""
    return [
        f"{type(each).__name__}: the mosaic_gpu kernel expects at least one slot: {each.shape=}"
        for each in tokens
        if each.num_slots == 0
    ]


def copy_rows[T: TokenRows](
    source: T, target: T, source_slots: Int[Array, "..."], target_slots: Int[Array, "..."]
) -> T:
    """The target with rows of the source, each in whichever memory.

    Under vmap it is done by XLA.

    Args:
        source: rows of any token axes, in the format of the target.
        target: rows of any token axes.
        source_slots: int32, one for each row that moves; one outside the source moves nothing.
        target_slots: int32; one outside the target is dropped.
    """
    return _compiled_copy(source, target, source_slots, target_slots)


@jax.custom_batching.custom_vmap
def _plan(residency: Any, positions: Any, seq_lens: Any) -> Planned:
    from pallas_kernels import hot_buffer

    planned = hot_buffer.plan_swap(
        _shape(residency, positions.shape[1]),
        tokens=residency.tokens,
        lru=residency.lru,
        page_table=residency.page_table,
        buffer_table=residency.buffer_table,
        positions=positions,
        seq_lens=seq_lens,
    )
    return Planned(*planned)


@_plan.def_vmap
def _plan_over_axis(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
    return over_axis(plan_by_xla, axis_size, in_batched, arguments)


def _place(residency: Any, seq_lens: Any, count: int) -> Any:
    @jax.custom_batching.custom_vmap
    def place(residency: Any, seq_lens: Any) -> Any:
        from pallas_kernels import hot_buffer

        return hot_buffer.place_new(
            _shape(residency, 1),
            count,
            tokens=residency.tokens,
            page_table=residency.page_table,
            buffer_table=residency.buffer_table,
            seq_lens=seq_lens,
        )

    @place.def_vmap
    def over(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
        def by_xla(residency: Any, seq_lens: Any) -> Any:
            after, *rows = place_by_xla(residency, seq_lens, count)
            return (after.tokens, *rows)

        return over_axis(by_xla, axis_size, in_batched, arguments)

    return place(residency, seq_lens)


@jax.custom_batching.custom_vmap
def _copy(source: Any, target: Any, source_slots: Any, target_slots: Any) -> Any:
    from pallas_kernels import hot_buffer

    names = _names(target)
    copied = hot_buffer.copy_rows(
        {name: getattr(source, name) for name in names},
        {name: getattr(target, name) for name in names},
        source_slots.reshape(-1),
        target_slots.reshape(-1),
        num_sources=source.num_slots,
        num_targets=target.num_slots,
    )
    return dataclasses.replace(target, **copied).map_tokens(in_memory_of, target)


@_copy.def_vmap
def _copy_over_axis(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
    return over_axis(copy_by_xla, axis_size, in_batched, arguments)


@jax.custom_batching.custom_vmap
def _swap(residency: Any, host_rows: Any, buffer_rows: Any, positions: Any, seq_lens: Any) -> Any:
    from pallas_kernels import hot_buffer

    names = _names(buffer_rows)
    tokens, lru, slots, copied = hot_buffer.swap_rows(
        _shape(residency, positions.shape[1]),
        {name: getattr(host_rows, name) for name in names},
        {name: getattr(buffer_rows, name) for name in names},
        tokens=residency.tokens,
        lru=residency.lru,
        page_table=residency.page_table,
        buffer_table=residency.buffer_table,
        positions=positions,
        seq_lens=seq_lens,
    )
    rows = dataclasses.replace(buffer_rows, **copied).map_tokens(in_memory_of, buffer_rows)
    return tokens, lru, slots, rows


def _swap_by_xla(
    residency: Any, host_rows: Any, buffer_rows: Any, positions: Any, seq_lens: Any
) -> Any:
    planned = plan_by_xla(residency, positions, seq_lens)
    rows = copy_by_xla(host_rows, buffer_rows, planned.sources, planned.targets)
    return planned.tokens, planned.lru, planned.slots, rows


@_swap.def_vmap
def _swap_over_axis(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
    return over_axis(_swap_by_xla, axis_size, in_batched, arguments)


def _names(rows: TokenRows) -> list[str]:
    """The arrays that move with a row; one without values has no address."""
    return [name for name in rows.token_leaves if getattr(rows, name).size]


# Compiled at the level of the module: a call outside jit would compile the kernels every time.
_compiled_plan = jax.jit(_plan)
_compiled_copy = jax.jit(_copy)
_compiled_swap = jax.jit(_swap)
_compiled_place = jax.jit(_place, static_argnums=2)


def _shape(residency: Residency, positions: int) -> Any:
    from pallas_kernels import hot_buffer

    sizes = residency.sizes
    return hot_buffer.Shape(
        requests=sizes.requests,
        positions=positions,
        size=sizes.device_buffer_size,
        newest=sizes.newest,
        page_size=sizes.page_size,
        max_pages=sizes.max_pages,
        num_pages=sizes.num_pages,
        max_buffer_pages=sizes.max_buffer_pages,
        num_buffer_pages=sizes.num_buffer_pages,
    )
