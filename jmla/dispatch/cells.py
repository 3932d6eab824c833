"""The compatibility table, cell by cell: what each phase of each backend reads, and by what code.

Derived from `jmla.backends` alone. The tests take their cases from here: every cell that says yes
is run on a Hopper, every one that says no is refused by `resolve`.
"""

import dataclasses
from typing import Literal

from jmla.backends import (
    BACKENDS,
    HEADS_BACKENDS,
    HEADS_PLATFORMS,
    PHASES,
    Phase,
    dtype_of,
    find_backend,
    find_heads_backend,
    kernels_over,
    layouts_read,
    pick_auto,
)
from jmla.layouts.base import KVLayout
from jmla.layouts.key_values import KEY_VALUE_DTYPES
from jmla.platforms import HOPPER

Attention = Literal["mla", "mha"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One phase of one backend over one kind of cache.

    Attributes:
        attention: "mla", or "mha" for keys and values of several heads.
        backend: the contract name.
        phase: "prefill" or "decode".
        storage: how the cache is stored: a layout of latents, or a `kv_cache_dtype` of keys and
            values.
        supported: whether jmla serves it.
        kernel: whether a device kernel serves it on Hopper, for the sizes of published models.
        page_sizes: the page sizes it takes; empty for any.
    """

    attention: Attention
    backend: str
    phase: Phase
    storage: KVLayout | str
    supported: bool
    kernel: bool
    page_sizes: tuple[int, ...]

    @property
    def kv_cache_dtype(self) -> str:
        """The serving engines' word for how the cache is stored."""
        return dtype_of(self.storage) if isinstance(self.storage, KVLayout) else self.storage

    def __str__(self) -> str:
        storage = self.storage.name if isinstance(self.storage, KVLayout) else self.storage
        return f"{self.attention} {self.backend} {self.phase} {storage}"


def cells() -> tuple[Cell, ...]:
    """All of them, MLA first."""
    latents = [
        _latent_cell(backend.name, phase, layout)
        for backend in BACKENDS
        for phase in PHASES
        for layout in KVLayout
    ]
    heads = [
        _heads_cell(backend.name, phase, dtype)
        for backend in HEADS_BACKENDS
        for phase in PHASES
        for dtype in KEY_VALUE_DTYPES
    ]
    return (*latents, *heads)


def _latent_cell(name: str, phase: Phase, layout: KVLayout) -> Cell:
    row = find_backend(name)
    assert row is not None
    served = name
    if row.picks:
        served, _ = pick_auto(layout, HOPPER, sinks=False)
    kernels = kernels_over(served, phase, layout)
    supported = layout in layouts_read(name, phase)
    return Cell(
        "mla",
        name,
        phase,
        layout,
        supported,
        supported and any(HOPPER in kernel.platforms for kernel in kernels),
        row.page_sizes,
    )


def _heads_cell(name: str, phase: Phase, dtype: str) -> Cell:
    row = find_heads_backend(name)
    assert row is not None
    supported = phase == "decode" and dtype in row.decode
    kernel = supported and HOPPER in HEADS_PLATFORMS
    return Cell("mha", name, phase, dtype, supported, kernel, row.page_sizes)
