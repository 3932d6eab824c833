"""The support table: which attention path reads which cache, how, and what is taken by default.

This is data with a few look-ups, and the only place to edit when a backend learns something.
`docs/attention_backends.md` is written from it. A *backend* is a contract, named as the serving
engines name it, so that a config carries over; on every platform XLA fulfils all of them, and a
device kernel only makes one faster. So kernels are no part of a backend's row: they are listed by
what they read.
"""

import dataclasses
from typing import Literal

from jmla import _mosaic_decode
from jmla.layouts.base import BLOCK_SCALE_TILE, FP4_BLOCK, V4_TILE, KVLayout
from jmla.layouts.key_values import KEY_VALUE_DTYPES
from jmla.platforms import HOPPER, is_blackwell

Phase = Literal["prefill", "decode"]
Reads = Literal["direct", "gather_dequantize", "convert", "fastest"]
IndexTransform = Literal["PAGED", "RAGGED", "PAGE_TABLE"]

PHASES: tuple[Phase, ...] = ("prefill", "decode")

_BF16 = KVLayout.BF16
_RAW = KVLayout.FP8_NOPE_FP8_ROPE
_BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
_FP4 = KVLayout.FP4
_V4 = KVLayout.FP8_V4

LAYOUTS_OF_DTYPE: tuple[tuple[str, tuple[KVLayout, ...]], ...] = (
    ("bfloat16", (_BF16,)),
    ("fp8_e4m3", (_BLOCK, _RAW, _V4)),
    ("fp4_e2m1", (_FP4,)),
)


@dataclasses.dataclass(frozen=True)
class Access:
    """How one phase of a backend reads one layout.

    Attributes:
        layout: the layout of the cache.
        reads: "direct" reads the stored rows in place; "gather_dequantize" makes bf16 of the rows
            it needs; "convert" re-packs the pages that the batch touches; "fastest" is
            one of the first two for each call. No row of the table has it: a plan comes to it.
        indices: "PAGED" are slots of the cache, "RAGGED" rows of the batch's gathered tokens;
            "PAGE_TABLE" takes no selection and attends to every token of the page table.
    """

    layout: KVLayout
    reads: Reads
    indices: IndexTransform


@dataclasses.dataclass(frozen=True)
class Backend:
    """One row of the support table.

    Attributes:
        name: the serving engines' name.
        prefill: what its prefill reads; empty if it has none.
        decode: what its decode reads; empty if it has none.
        page_sizes: the page sizes it takes; empty for any.
        sinks: whether it adds attention sinks.
        picks: the backends this name stands for; a name that picks has no rows of its own.
    """

    name: str
    prefill: tuple[Access, ...] = ()
    decode: tuple[Access, ...] = ()
    page_sizes: tuple[int, ...] = ()
    sinks: bool = False
    picks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A device kernel: it serves whatever backend reads such a cache with such indices.

    Attributes:
        phase: the phase it computes.
        indices: the indices it takes.
        platforms: where it runs; elsewhere XLA fulfils the contract.
        layouts: the layouts it reads, or whose gathered rows it reads.
    """

    phase: Phase
    indices: IndexTransform
    platforms: tuple[str, ...]
    layouts: tuple[KVLayout, ...]


@dataclasses.dataclass(frozen=True)
class HeadsBackend:
    """One row of the table for caches of keys and values with several heads: MHA and GQA.

    A prompt's keys and values are at hand when it is computed, so that any attention serves it:
    jmla has no prefill over such a cache.

    Attributes:
        name: the serving engines' name.
        decode: the `kv_cache_dtype`s that its decode reads in place, through a page table.
        page_sizes: the page sizes it takes; empty for any.
    """

    name: str
    decode: tuple[str, ...]
    page_sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class EngineBackend:
    """A backend of the serving engines that jmla knows by name and does not serve."""

    name: str
    nearest: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Default:
    """Backends in order of preference for a phase without a named one.

    Attributes:
        layout: the layout of the cache.
        blackwell: True or False for that platform family alone, None for all.
        prefill: the first that meets page size and sinks is taken.
        decode: likewise.
    """

    layout: KVLayout
    blackwell: bool | None
    prefill: tuple[str, ...]
    decode: tuple[str, ...]


def _direct(*layouts: KVLayout, indices: IndexTransform = "PAGED") -> tuple[Access, ...]:
    return tuple(Access(layout, "direct", indices) for layout in layouts)


def _gathered(*layouts: KVLayout, indices: IndexTransform) -> tuple[Access, ...]:
    return tuple(Access(layout, "gather_dequantize", indices) for layout in layouts)


_DENSE = (
    *_direct(_BF16, _RAW, _BLOCK, indices="PAGE_TABLE"),
    *_gathered(_FP4, indices="PAGE_TABLE"),
)

BACKENDS: tuple[Backend, ...] = (
    Backend(
        "flashmla_sparse",
        # Prompts attend to most of their tokens often: each is dequantised once for the batch.
        prefill=(*_direct(_BF16), *_gathered(_RAW, _BLOCK, _FP4, _V4, indices="RAGGED")),
        # A decode step needs few of its tokens once: only the selected slots are dequantised.
        decode=(*_direct(_BF16), *_gathered(_RAW, _BLOCK, _FP4, _V4, indices="PAGED")),
        sinks=True,
    ),
    Backend(
        "flashmla_kv",
        # A prompt is converted once; decode would convert its whole context at every step.
        prefill=(*_direct(_BLOCK, _V4), Access(_RAW, "convert", "PAGED")),
        decode=_direct(_BLOCK, _V4),
    ),
    Backend("flashmla_auto", picks=("flashmla_sparse", "flashmla_kv")),
    Backend(
        "trtllm", prefill=_direct(_RAW, _BF16), decode=_direct(_RAW, _BF16), page_sizes=(32, 64)
    ),
    Backend("fa3", prefill=_direct(_BF16), decode=_direct(_BF16)),
    Backend("flashmla", prefill=_DENSE, decode=_DENSE, page_sizes=(64,)),
)

KERNELS: tuple[Kernel, ...] = (
    Kernel("decode", "PAGE_TABLE", (HOPPER,), _mosaic_decode.LAYOUTS),
    # Tiles of a prompt are requests with many tokens.
    Kernel("prefill", "PAGE_TABLE", (HOPPER,), _mosaic_decode.LAYOUTS),
    Kernel("decode", "PAGED", (HOPPER,), _mosaic_decode.LAYOUTS),
    Kernel("prefill", "PAGED", (HOPPER,), _mosaic_decode.LAYOUTS),
    # Gathered rows of FP8_V4 are values without a rotary part, which no kernel reads.
    Kernel("prefill", "RAGGED", (HOPPER,), (_RAW, _BLOCK, _FP4)),
)

HEADS_BACKENDS: tuple[HeadsBackend, ...] = (
    HeadsBackend("fa3", decode=KEY_VALUE_DTYPES),
    HeadsBackend("trtllm_mha", decode=KEY_VALUE_DTYPES, page_sizes=(16, 32, 64)),
)
HEADS_PLATFORMS = (HOPPER,)
"""Where a device kernel serves their decode, of heads of `_mosaic_gqa.HEAD_DIMS` values."""

ENGINE_BACKENDS: tuple[EngineBackend, ...] = (
    EngineBackend("aiter", ("flashmla_sparse", "fa3")),
    EngineBackend("ascend", ("flashmla_sparse", "flashmla")),
    EngineBackend("cutedsl_mla", ("flashmla", "trtllm")),
    EngineBackend("cutlass_mla", ("flashmla",)),
    EngineBackend("fa4", ("fa3", "flashmla")),
    EngineBackend("flashinfer", ("flashmla",)),
    EngineBackend("flashinfer_sparse_mla", ("flashmla_kv", "flashmla_sparse")),
    EngineBackend("flashmla_sparse_q8", ("flashmla_sparse",)),
    EngineBackend("flex_attention", ("flashmla",)),
    EngineBackend("intel_xpu", ("flashmla_sparse",)),
    EngineBackend("tilelang", ("flashmla_sparse", "flashmla_kv")),
    EngineBackend("torch_native", ("flashmla",)),
    EngineBackend("triton", ("flashmla_sparse", "flashmla")),
    EngineBackend("triton_sparse_mla", ("flashmla_sparse",)),
    EngineBackend("trtllm_mha", ("trtllm",)),
    EngineBackend("trtllm_mla", ("trtllm", "flashmla")),
)

HEADS_ENGINE_BACKENDS: tuple[EngineBackend, ...] = (
    EngineBackend("aiter", ("fa3",)),
    EngineBackend("ascend", ("fa3",)),
    EngineBackend("dual_chunk_flash_attn", ("fa3",)),
    EngineBackend("fa4", ("fa3",)),
    EngineBackend("flashinfer", ("fa3",)),
    EngineBackend("flex_attention", ("fa3",)),
    EngineBackend("intel_amx", ("fa3",)),
    EngineBackend("intel_xpu", ("fa3",)),
    EngineBackend("torch_native", ("fa3",)),
    EngineBackend("triton", ("fa3",)),
    EngineBackend("wave", ("fa3",)),
)

DEFAULTS: tuple[Default, ...] = (
    Default(_BF16, True, ("flashmla_sparse",), ("trtllm", "fa3", "flashmla_sparse")),
    Default(_BF16, False, ("flashmla_sparse",), ("fa3", "flashmla_sparse")),
    Default(_BLOCK, None, ("flashmla_kv", "flashmla_sparse"), ("flashmla_kv", "flashmla_sparse")),
    Default(_RAW, None, ("trtllm", "flashmla_sparse"), ("trtllm", "flashmla_sparse")),
    Default(_FP4, None, ("flashmla_sparse",), ("flashmla_sparse",)),
    Default(_V4, None, ("flashmla_kv", "flashmla_sparse"), ("flashmla_kv", "flashmla_sparse")),
)

HISPARSE_BACKENDS: tuple[tuple[KVLayout, str], ...] = (
    (_BF16, "flashmla_sparse"),
    (_BLOCK, "flashmla_kv"),
    (_RAW, "flashmla_sparse"),
    (_FP4, "flashmla_sparse"),
    (_V4, "flashmla_kv"),
)


def find_backend(name: str) -> Backend | None:
    """The row of that name, or None."""
    return next((backend for backend in BACKENDS if backend.name == name), None)


def find_heads_backend(name: str) -> HeadsBackend | None:
    """The row of that name for caches with several heads, or None."""
    return next((backend for backend in HEADS_BACKENDS if backend.name == name), None)


def serves(name: str, phase: Phase) -> bool:
    """Whether jmla has a backend of that name for that phase. A name that picks is for prefill."""
    backend = find_backend(name)
    if backend is None:
        return False
    return phase == "prefill" if backend.picks else bool(_accesses(backend, phase))


def backends_of(phase: Phase) -> tuple[str, ...]:
    """The names that serve that phase."""
    return tuple(backend.name for backend in BACKENDS if serves(backend.name, phase))


def access(name: str, phase: Phase, layout: KVLayout) -> Access | None:
    """How that phase of that backend reads that layout, or None if it cannot."""
    return next((row for row in _rows_of(name, phase) if row.layout is layout), None)


def kernels_of(name: str, phase: Phase) -> tuple[Kernel, ...]:
    """The device kernels that serve that phase of that backend, over some layout it reads."""
    reads = {(how.layout, how.indices) for how in _rows_of(name, phase)}
    return tuple(
        kernel
        for kernel in KERNELS
        if kernel.phase == phase and reads & {(x, kernel.indices) for x in kernel.layouts}
    )


def kernels_over(name: str, phase: Phase, layout: KVLayout) -> tuple[Kernel, ...]:
    """Those of them that serve it over that layout."""
    how = access(name, phase, layout)
    return kernels_reading(phase, how) if how else ()


def kernels_reading(phase: Phase, how: Access) -> tuple[Kernel, ...]:
    """The device kernels that read such a cache with such indices."""
    return tuple(
        kernel
        for kernel in KERNELS
        if kernel.phase == phase and kernel.indices == how.indices and how.layout in kernel.layouts
    )


def layouts_read(name: str, phase: Phase) -> tuple[KVLayout, ...]:
    """The layouts that that phase of that backend reads, in KVLayout's order."""
    backend = find_backend(name)
    names = (backend.picks or (name,)) if backend and serves(name, phase) else ()
    return tuple(
        layout for layout in KVLayout if any(access(n, phase, layout) is not None for n in names)
    )


def pick_auto(layout: KVLayout, platform: str, *, sinks: bool) -> tuple[str, str]:
    """What `flashmla_auto` stands for, and why: a function of static facts, never of a batch.

    Args:
        layout: the layout of the cache.
        platform: a concrete platform name.
        sinks: whether the model has attention sinks.
    """
    if sinks:
        return "flashmla_sparse", "only flashmla_sparse adds attention sinks"
    if layout is _BLOCK and is_blackwell(platform):
        return "flashmla_sparse", (
            "on Blackwell it is faster over block scales for all but the longest contexts"
        )
    if access("flashmla_kv", "prefill", layout):
        return "flashmla_kv", f"it takes {layout.name} caches"
    return "flashmla_sparse", f"flashmla_kv does not read {layout.name}"


def default_names(phase: Phase, layout: KVLayout, platform: str) -> tuple[str, ...]:
    """The backends to try for a phase without a named one, best first."""
    blackwell = is_blackwell(platform)
    row = next(
        row for row in DEFAULTS if row.layout is layout and row.blackwell in (None, blackwell)
    )
    return row.prefill if phase == "prefill" else row.decode


def dtype_of(layout: KVLayout) -> str:
    """The `kv_cache_dtype` that a layout stores."""
    return next(dtype for dtype, layouts in LAYOUTS_OF_DTYPE if layout in layouts)


def sizes_problem(layout: KVLayout, rank: int, rope_dim: int) -> str | None:
    """Why the layout is not defined for latents of these sizes, or None if it is."""
    tile = {_BLOCK: BLOCK_SCALE_TILE, _V4: V4_TILE, _FP4: FP4_BLOCK}.get(layout, 1)
    sizes = f"one scale per {tile} values needs {tile} to divide kv_lora_rank={rank}"
    if layout is _FP4 and rope_dim % tile:
        return f"{sizes} and rope_dim={rope_dim}"
    return sizes if rank % tile else None


def _rows_of(name: str, phase: Phase) -> tuple[Access, ...]:
    backend = find_backend(name)
    return _accesses(backend, phase) if backend else ()


def _accesses(backend: Backend, phase: Phase) -> tuple[Access, ...]:
    return backend.prefill if phase == "prefill" else backend.decode
