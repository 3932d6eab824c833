"""The launch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.cache_codec.formats import Format
from pallas_kernels.cache_codec.stripes import Conversion, Rows, Slots, convert
from pallas_kernels.cache_codec.tuning import spread
from pallas_kernels.device.memory import global_address
from pallas_kernels.device.simt import WARP, WARPGROUP, block_thread, scalar, when


@dataclasses.dataclass(frozen=True)
class Side:
    """Rows of one format.

    Attributes:
        format: of the rows.
        arrays: by the names that the format uses; those of a new target are shapes.
        rows: how many there are.
    """

    format: Format
    arrays: Mapping[str, Any]
    rows: int


def transcode(
    pairs: Sequence[tuple[Side, Side]],
    *,
    rows: int,
    source_slots: Int[Array, " rows"] | None = None,
    target_slots: Int[Array, " rows"] | None = None,
    written: Sequence[Sequence[str]],
) -> list[dict[str, Array]]:
    """Rows of the sources as rows of the targets, in one kernel.

    Args:
        pairs: sources and targets; of each, the same rows.
        rows: how many, at least 1.
        source_slots: int32, the row of the source that each row is. A slot outside of it gives a
            row of zeros. None takes the rows in order.
        target_slots: int32, the row of the target that each row becomes; the others stay. A slot
            outside of it is dropped; of duplicates an unspecified one stays. None makes new
            arrays, of the shapes that the targets have for arrays.
        written: the arrays of each target that change; the others are read.

    Returns:
        The arrays of each target that are written.
    """
    in_place = target_slots is not None
    read: dict[str, Array] = {}
    changed: dict[str, Any] = {}
    for i, ((source, target), names) in enumerate(zip(pairs, written, strict=True)):
        read |= {f"source{i}.{name}": array for name, array in source.arrays.items()}
        for name, array in target.arrays.items():
            (changed if name in names else read)[f"target{i}.{name}"] = array
    for name, slots in (("source_slots", source_slots), ("target_slots", target_slots)):
        if slots is not None:
            read[name] = slots
    if in_place:
        changed = {name: jax.new_ref(array) for name, array in changed.items()}
    names = [*read, *changed]
    source, target = pairs[0]
    count, warpgroups = spread(source.format, target.format, rows)
    rows_of_a_block = warpgroups * (WARPGROUP // WARP) * count

    def cache_codec(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, refs: Any, number: Any) -> None:
            bases = {name: global_address(ref) for name, ref in zip(names, refs, strict=True)}

            def of(prefix: str) -> dict[str, Any]:
                start = len(prefix)
                return {k[start:]: base for k, base in bases.items() if k.startswith(prefix)}

            conversions = [
                Conversion(source.format, target.format, of(f"source{i}."), of(f"target{i}."))
                for i, (source, target) in enumerate(pairs)
            ]
            first = scalar(number) * rows_of_a_block + (block_thread() // WARP) * count

            slots = [
                Slots(bases[name], side.rows) if name in bases else None
                for name, side in (("source_slots", source), ("target_slots", target))
            ]
            when(first < rows, lambda: convert(conversions, Rows(first, count, rows, *slots)))

        emit(tuple(refs), lax.axis_index("block"))

    launch = plgpu.kernel(
        cache_codec,
        out_type=() if in_place else tuple(changed.values()),
        # One axis: the others end at 65535.
        grid=(-(-rows // rows_of_a_block),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    if in_place:
        launch(*read.values(), *changed.values())
        results = {name: jax.freeze(ref) for name, ref in changed.items()}
    else:
        results = dict(zip(changed, launch(*read.values()), strict=True))
    return [{name: results[f"target{i}.{name}"] for name in each} for i, each in enumerate(written)]
