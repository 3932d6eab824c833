"""The kernels that write and convert rows, on the emulator, called as `jmla` calls them."""

import dataclasses
from typing import Any

import numpy as np

from jmla import _mosaic_cache as mosaic
from jmla.layouts.base import Rows, TokenRows
from tests.emulator.kernels import kernels


def _side(tokens: TokenRows | np.ndarray, arrays: dict[str, Any] | None = None) -> Any:
    side = mosaic._side(tokens)  # type: ignore[arg-type]
    call = kernels().modules["cache_codec.call"]
    form = _copied(side.format)
    given = {name: np.asarray(array) for name, array in side.arrays.items()} | (arrays or {})
    return call.Side(form, given, side.rows)


def _copied(form: Any) -> Any:
    """The format, of the classes of the emulator's copies."""
    modules = kernels().modules
    if isinstance(form, tuple):
        return tuple(_copied(each) for each in form)
    if not dataclasses.is_dataclass(form):
        return form
    name = type(form).__module__.removeprefix("pallas_kernels.")
    fields = {f.name: _copied(getattr(form, f.name)) for f in dataclasses.fields(form)}
    return getattr(modules[name], type(form).__name__)(**fields)


def rewrite(source: Rows | np.ndarray, form: Rows, slots: np.ndarray | None = None) -> Rows:
    """`jmla._mosaic_cache.rewrite` of tokens with one axis."""
    call = kernels().modules["cache_codec.call"]
    rows = _count(source) if slots is None else slots.size
    leaves = {
        name: call.jax.ShapeDtypeStruct((rows, *per_token), dtype)
        for name, (per_token, dtype) in form.token_leaves.items()
    }
    (stored,) = call.transcode(
        [(_side(source), _side(form, leaves))],
        rows=rows,
        source_slots=slots,
        written=[tuple(leaves)],
    )
    return dataclasses.replace(form, **stored)


def store(
    targets: list[TokenRows],
    slots: np.ndarray,
    sources: list[Any],
    source_slots: np.ndarray | None = None,
) -> list[TokenRows]:
    """`jmla._mosaic_cache.store` of latents, or of rows without a scale for the tensor."""
    call = kernels().modules["cache_codec.call"]
    stored = call.transcode(
        [(_side(a), _side(b)) for a, b in zip(sources, targets, strict=True)],
        rows=slots.size,
        source_slots=source_slots,
        target_slots=slots,
        written=[tuple(target.token_leaves) for target in targets],
    )
    return [
        dataclasses.replace(
            target,
            **{name: leaf.reshape(getattr(target, name).shape) for name, leaf in leaves.items()},
        )
        for target, leaves in zip(targets, stored, strict=True)
    ]


def _count(source: Rows | np.ndarray) -> int:
    return source.num_slots if isinstance(source, Rows) else source.shape[0]
