"""The launches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32

from pallas_kernels.device.memory import global_address, load_global, shared_address
from pallas_kernels.device.simt import (
    WARP,
    WARPGROUP,
    Value,
    block_thread,
    i32,
    minimum,
    scalar,
    select,
)
from pallas_kernels.hot_buffer.block import Block
from pallas_kernels.hot_buffer.copying import Part, copy_own_rows
from pallas_kernels.hot_buffer.place import place_request
from pallas_kernels.hot_buffer.plan import plan_request
from pallas_kernels.hot_buffer.shape import MOST_ITEMS, SHARED_BYTES, Shape
from pallas_kernels.hot_buffer.tuning import (
    COPY_WARPGROUPS,
    plan_threads,
    rows_of_swap_together,
    rows_together,
)

_COMPILER = plgpu.CompilerParams(
    unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


def problems(shape: Shape) -> list[str]:
    """Why `plan_swap` cannot be launched; none if it can."""
    found = []
    if shape.positions > MOST_ITEMS:
        found.append(
            f"{shape.positions} positions of a request: the mosaic_gpu kernel takes at most "
            f"{MOST_ITEMS}"
        )
    if shape.size > MOST_ITEMS:
        found.append(
            f"device_buffer_size={shape.size}: the mosaic_gpu kernel takes at most {MOST_ITEMS}"
        )
    needed = 4 * sum(shape.shared_words(plan_threads(shape)).values())
    if needed > SHARED_BYTES:
        found.append(
            f"{shape.context} positions of a request and {shape.slots} slots: the mosaic_gpu "
            f"kernel needs {needed} bytes of shared memory for them, expected at most "
            f"{SHARED_BYTES}"
        )
    return found


class Planned(NamedTuple):
    """What a swap makes of the tables, and what it asks of the rows.

    Attributes:
        tokens: int32 [requests, slots], the position that each slot holds now.
        lru: int32 [requests, size], the slots in their new order.
        rows: int32 [requests, positions], the device row of each position; -1 for none.
        sources: int32 [requests, positions], the host row of each position to be fetched, or -1.
        targets: int32 [requests, positions], the device row where it goes, or -1.
    """

    tokens: Int32[Array, "requests slots"]
    lru: Int32[Array, "requests size"]
    rows: Int32[Array, "requests n"]
    sources: Int32[Array, "requests n"]
    targets: Int32[Array, "requests n"]


def plan_swap(
    shape: Shape,
    *,
    tokens: Int[Array, "requests slots"],
    lru: Int[Array, "requests size"],
    page_table: Int[Array, "requests pages"],
    buffer_table: Int[Array, "requests buffer_pages"],
    positions: Int[Array, "requests n"],
    seq_lens: Int[Array, " requests"],
    threads: int | None = None,
) -> Planned:
    """The LRU rule for every request, one block of the grid for each.

    Args:
        shape: of the arrays.
        tokens: int32, the position that each slot holds, -1 for none; no position twice.
        lru: int32, a permutation of the slots in each row.
        page_table: int32, host pages.
        buffer_table: int32, device pages.
        positions: int32, any numbers.
        seq_lens: int32, 0 for an idle row.
        threads: of a block, a multiple of 128; None chooses by the shape.
    """
    threads = threads or plan_threads(shape)
    result = jax.ShapeDtypeStruct((shape.requests, shape.positions), jnp.int32)
    changed, results = _of_requests(
        plan_request,
        shape,
        {
            "page_table": page_table,
            "buffer_table": buffer_table,
            "positions": positions,
            "seq_lens": seq_lens,
        },
        {"tokens": tokens, "lru": lru},
        {"rows": result, "sources": result, "targets": result},
        threads=threads,
        shared_words=sum(shape.shared_words(threads).values()),
    )
    return Planned(*changed, *results)


def swap_rows(
    shape: Shape,
    sources: Mapping[str, Array],
    targets: Mapping[str, Array],
    *,
    tokens: Int[Array, "requests slots"],
    lru: Int[Array, "requests size"],
    page_table: Int[Array, "requests pages"],
    buffer_table: Int[Array, "requests buffer_pages"],
    positions: Int[Array, "requests n"],
    seq_lens: Int[Array, " requests"],
    together: int | None = None,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """`plan_swap`, and each block fetches what its request misses.

    Args:
        shape: as in `plan_swap`, and so are the arrays that are not told here.
        sources: the host's arrays.
        targets: the device's, of the same names and dtypes, and rows of as many bytes.
        together: rows of a warp under way at once; None chooses by their size.

    Returns:
        tokens, lru and rows as in `Planned`, and the targets.
    """
    threads, names = plan_threads(shape), list(sources)
    num_targets = shape.num_buffer_pages * shape.page_size
    sizes = [targets[name].size * targets[name].dtype.itemsize // num_targets for name in names]
    together = together or rows_of_swap_together(sum(sizes))

    def swap(block: Block) -> None:
        stored, buffers = (
            [block.arrays[f"{side} {name}"] for name in names] for side in ("host", "buffer")
        )
        parts = _parts(stored, buffers, sizes)
        lane = block_thread() & (WARP - 1)
        plan_request(
            block, lambda source, target: copy_own_rows(parts, source, target, lane, together)
        )

    changed, (rows,) = _of_requests(
        swap,
        shape,
        {
            "page_table": page_table,
            "buffer_table": buffer_table,
            "positions": positions,
            "seq_lens": seq_lens,
            **{f"host {name}": sources[name] for name in names},
        },
        {"tokens": tokens, "lru": lru, **{f"buffer {name}": targets[name] for name in names}},
        {"rows": jax.ShapeDtypeStruct((shape.requests, shape.positions), jnp.int32)},
        threads=threads,
        shared_words=sum(shape.shared_words(threads).values()),
    )
    after, order, *copied = changed
    return after, order, rows, dict(zip(names, copied, strict=True))


def place_new(
    shape: Shape,
    count: int,
    *,
    tokens: Int[Array, "requests slots"],
    page_table: Int[Array, "requests pages"],
    buffer_table: Int[Array, "requests buffer_pages"],
    seq_lens: Int[Array, " requests"],
) -> tuple[Array, Array, Array]:
    """The last `count` tokens of every request made resident, one block of the grid for each.

    Args:
        shape: of the arrays; its positions do not matter.
        count: at most `shape.newest`.
        tokens: int32, the position that each slot holds, -1 for none.
        page_table: int32, host pages.
        buffer_table: int32, device pages.
        seq_lens: int32, the new tokens included; 0 for an idle row.

    Returns:
        The tokens after it, and int32 [requests, count] host rows and device rows, -1 for none.
    """
    result = jax.ShapeDtypeStruct((shape.requests, count), jnp.int32)
    changed, results = _of_requests(
        lambda block: place_request(block, count),
        shape,
        {"page_table": page_table, "buffer_table": buffer_table, "seq_lens": seq_lens},
        {"tokens": tokens},
        {"host_slots": result, "rows": result},
        threads=plan_threads(shape),
    )
    host_slots, rows = results
    return changed[0], host_slots, rows


def _of_requests(
    work: Callable[[Block], None],
    shape: Shape,
    read: Mapping[str, Array],
    changed: Mapping[str, Array],
    results: Mapping[str, jax.ShapeDtypeStruct],
    *,
    threads: int,
    shared_words: int = 0,
) -> tuple[list[Array], Sequence[Array]]:
    """A block of the grid for each request: the arrays that it has changed, and its results."""
    names = [*read, *changed, *results]
    refs_of_changed = [jax.new_ref(array) for array in changed.values()]

    def kernel(*refs: Any) -> None:
        shared = refs[len(names) :]

        @plgpu.inline_mgpu(
            arg_types=(
                [plgpu.RefType() for _ in names],
                [plgpu.RefType() for _ in shared],
                plgpu.Layout.WG_SPLAT,
            )
        )
        def emit(_: Any, arrays: Any, shared: Any, request: Any) -> None:
            addresses = dict(zip(names, map(global_address, arrays), strict=True))
            parts = {}
            if shared:
                parts = shape.shared_parts(threads, shared_address(shared[0]))
            work(Block(shape, threads, block_thread(), scalar(request), parts, addresses))

        emit(list(refs[: len(names)]), list(shared), lax.axis_index("request"))

    scratch = [plgpu.SMEM((shared_words,), jnp.int32)] if shared_words else []
    made = plgpu.kernel(
        kernel,
        out_type=tuple(results.values()),
        grid=(shape.requests,),
        grid_names=("request",),
        num_threads=threads // WARPGROUP,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=_COMPILER,
    )(*read.values(), *refs_of_changed)
    return [jax.freeze(ref) for ref in refs_of_changed], made


def copy_rows(
    sources: Mapping[str, Array],
    targets: Mapping[str, Array],
    source_rows: Int[Array, " n"],
    target_rows: Int[Array, " n"],
    *,
    num_sources: int,
    num_targets: int,
    together: int | None = None,
) -> dict[str, Array]:
    """The targets with rows of the sources, each side in device memory or in `pinned_host`.

    Args:
        sources: arrays of any axes.
        targets: arrays of the same names and dtypes, and rows of as many bytes.
        source_rows: int32, the row of the sources that each of n is; one outside of them is not
            copied.
        target_rows: int32, the row of the targets that it becomes; one outside of them is dropped.
            Of duplicates an unspecified one stays.
        num_sources: rows that there are.
        num_targets: rows that there are.
        together: rows of a warp under way at once; None chooses by their size.
    """
    names = list(sources)
    sizes = [targets[name].size * targets[name].dtype.itemsize // num_targets for name in names]
    count = source_rows.shape[0]
    refs_of_targets = [jax.new_ref(targets[name]) for name in names]
    together = together or rows_together(sum(sizes))

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=([plgpu.RefType() for _ in refs], plgpu.Layout.WG_SPLAT))
        def emit(_: Any, arrays: Any, block: Any) -> None:
            addresses = [global_address(array) for array in arrays]
            parts = _parts(addresses[: len(names)], addresses[-len(names) :], sizes)
            lists = addresses[len(names) : -len(names)]
            first = scalar(block) * (COPY_WARPGROUPS * WARPGROUP) + block_thread()
            place = minimum(first, count - 1).wide() * 4
            source, target = (load_global(each + place, "r")[0] for each in lists)
            moves = (first < count) & source.below(num_sources) & target.below(num_targets)
            lane = block_thread() & (WARP - 1)
            copy_own_rows(parts, select(moves, source, i32(-1)), target, lane, together)

        emit(list(refs), lax.axis_index("block"))

    plgpu.kernel(
        kernel,
        out_type=(),
        # One axis: the others end at 65535.
        grid=(-(-count // (COPY_WARPGROUPS * WARPGROUP)),),
        grid_names=("block",),
        num_threads=COPY_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=_COMPILER,
    )(*(sources[name] for name in names), source_rows, target_rows, *refs_of_targets)
    return {name: jax.freeze(ref) for name, ref in zip(names, refs_of_targets, strict=True)}


def _parts(sources: Sequence[Value], targets: Sequence[Value], sizes: Sequence[int]) -> list[Part]:
    return [Part(*each) for each in zip(sources, targets, sizes, strict=True)]
