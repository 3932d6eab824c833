"""The kernel: a warp copies one piece of one page of one array.

An array may be page-locked memory of the host (`pinned_host`), which a kernel addresses as its own:
loads and stores then cross the link. All loads of a warp are under way before the first store.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.device.memory import (
    global_address,
    load_global,
    load_global_byte,
    store_global,
    store_global_byte,
)
from pallas_kernels.device.simt import (
    WARP,
    WARPGROUP,
    Value,
    block_thread,
    i32,
    scalar,
    select,
    when,
)

_WARPS = WARPGROUP // WARP
_ACCESSES = 8  # of a lane


def copy_pages(
    sources: Sequence[Array],
    targets: Sequence[Array] | None,
    source_pages: Int[Array, " n"] | None,
    target_pages: Int[Array, " n"] | None,
) -> list[Array]:
    """The targets with pages of the sources, in one kernel.

    Args:
        sources: arrays of any dtype whose first axis, the same for all, is pages.
        targets: for each source an array with pages of the same shape and dtype, which is updated
            in place; None makes arrays of n pages in device memory.
        source_pages: int32, at least one. None is all pages of the sources in order.
        target_pages: int32; a pair of which either page does not exist is dropped, and leaves a new
            page as it is found. None is the pages of the targets in order.
    """
    given = source_pages if source_pages is not None else target_pages
    n = sources[0].shape[0] if given is None else given.shape[0]
    changed: list[Any] = [jax.new_ref(target) for target in targets or ()] or [
        jax.ShapeDtypeStruct((n, *source.shape[1:]), source.dtype) for source in sources
    ]
    lists = [pages for pages in (source_pages, target_pages) if pages is not None]
    sizes = [source.nbytes // source.shape[0] for source in sources]
    pieces = [-(-size // _piece(size)) for size in sizes]
    items = sum(pieces)
    num_sources, num_targets = sources[0].shape[0], targets[0].shape[0] if targets else n

    def page_copy(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, refs: Any, number: Any) -> None:
            bases = [global_address(ref) for ref in refs]
            item = scalar(number) * _WARPS + block_thread() // WARP
            pair, piece = item // items, item % items
            froms, tos = bases[len(lists) :][: len(sources)], bases[-len(sources) :]

            def copy() -> None:
                page, goal = pair, pair
                if source_pages is not None:
                    (page,) = load_global(bases[0] + pair.wide() * 4, "r")
                if target_pages is not None:
                    (goal,) = load_global(bases[len(lists) - 1] + pair.wide() * 4, "r")
                exists = page.below(num_sources) & goal.below(num_targets)
                first = 0
                for source, target, size, count in zip(froms, tos, sizes, pieces, strict=True):
                    when(
                        exists & (piece - first).below(count),
                        functools.partial(
                            _copy_piece,
                            source + page.wide() * size,
                            target + goal.wide() * size,
                            piece - first,
                            size,
                        ),
                    )
                    first += count

            when(pair < n, copy)

        emit(tuple(refs), lax.axis_index("block"))

    launch = plgpu.kernel(
        page_copy,
        out_type=() if targets else tuple(changed),
        # One axis: the others end at 65535.
        grid=(-(-n * items // _WARPS),),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    if not targets:
        return list(launch(*lists, *sources))
    launch(*lists, *sources, *changed)
    return [jax.freeze(ref) for ref in changed]


def _word(size: int) -> int:
    """Bytes of the widest access to a page of this size."""
    return next(word for word in (16, 4, 1) if size % word == 0)


def _piece(size: int) -> int:
    """Bytes of a warp's part of a page."""
    return _ACCESSES * WARP * _word(size)


def _copy_piece(source: Value, target: Value, piece: Value, size: int) -> None:
    word = _word(size)
    first = piece * _piece(size) + (block_thread() & (WARP - 1)) * word
    loaded = []
    for access in range(_ACCESSES):
        offset = first + access * WARP * word
        exists = offset.below(size)
        address = source + select(exists, offset, i32(0)).wide()
        words = (
            [load_global_byte(address)] if word == 1 else load_global(address, "r" * (word // 4))
        )
        loaded.append((exists, target + offset.wide(), words))
    for exists, address, words in loaded:
        store = functools.partial(store_global, address, words)
        if word == 1:
            store = functools.partial(store_global_byte, address, words[0])
        when(exists, store)
