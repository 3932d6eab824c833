"""How one phase of a plan is served, decided from its own setting and the facts both share.

That nothing here can see the other phase's setting is the point of this file.
"""

import dataclasses
from typing import Self

from jmla import _prefill_reads
from jmla._mosaic_decode import layout_reasons
from jmla.backends import (
    HISPARSE_BACKENDS,
    Access,
    Backend,
    Phase,
    access,
    default_names,
    find_backend,
    kernels_of,
    kernels_reading,
    pick_auto,
)
from jmla.config import Config
from jmla.layouts.base import KVLayout
from jmla.platforms import HOPPER, describe_platform

_ROOMS = (32768, 131072)  # tokens of a page table, as examples


@dataclasses.dataclass(frozen=True)
class SharedFacts:
    """What a phase is decided from, apart from its own setting.

    Attributes:
        layout: the layout of the cache.
        rank: no-position values of a latent.
        rope_dim: rotary values of a latent.
        num_heads: query heads on one device.
        topk: positions that the selection gives each query.
        platform: a concrete platform.
        page_size: tokens per page.
        sinks: whether the model has attention sinks.
        hisparse: whether the cache is host-resident.
        implementation: the named implementation, or None.
    """

    layout: KVLayout
    rank: int
    rope_dim: int
    num_heads: int
    topk: int
    platform: str
    page_size: int
    sinks: bool
    hisparse: bool
    implementation: str | None

    @classmethod
    def of(cls, config: Config, layout: KVLayout, platform: str) -> Self:
        """The shared facts of a config."""
        return cls(
            layout=layout,
            rank=config.kv_lora_rank,
            rope_dim=config.rope_dim,
            num_heads=config.num_heads,
            topk=config.index_topk,
            platform=platform,
            page_size=config.page_size,
            sinks=config.attn_sink,
            hisparse=config.hisparse is not None,
            implementation=config.implementation,
        )


@dataclasses.dataclass(frozen=True)
class PhaseChoice:
    """A backend with rows of its own in the table, how it reads the cache, and why."""

    backend: str
    access: Access
    reasons: tuple[str, ...]


def choose_phase(phase: Phase, named: str | None, facts: SharedFacts) -> PhaseChoice:
    """The backend of a phase.

    Args:
        phase: which one.
        named: the config's backend for this phase, one that reads `facts.layout`, or None.
        facts: what both phases share.
    """
    if named == "flashmla_auto":
        backend, why = pick_auto(facts.layout, facts.platform, sinks=facts.sinks)
        why = f"flashmla_auto stands for {backend} here: {why}"
    elif named is not None:
        backend, why = named, f"named by {phase}_backend={named!r}"
    else:
        backend, why = _default(phase, facts)
    how = access(backend, phase, facts.layout)
    assert how is not None, (backend, phase, facts.layout)
    if phase == "prefill" and named in (None, "flashmla_auto"):
        how = _fastest(how, facts)
    runs = _what_runs(backend, phase, how, facts)
    return PhaseChoice(backend, how, (why, _how_it_reads(how, facts), runs))


def fits(backend: Backend, facts: SharedFacts) -> bool:
    """Whether a backend takes the page size and the sinks of a config."""
    return (not backend.page_sizes or facts.page_size in backend.page_sizes) and (
        backend.sinks or not facts.sinks
    )


def _fastest(how: Access, facts: SharedFacts) -> Access:
    """How a sparse prefill that nobody has named reads the cache, where a kernel serves it."""
    served = facts.platform == HOPPER and facts.implementation in (None, "mosaic_gpu")
    served &= not layout_reasons(facts.layout, facts.rank, facts.rope_dim)
    if not served or how.indices == "PAGE_TABLE" or how.layout is KVLayout.BF16:
        return how
    copied = _prefill_reads.first_gathering(how.layout, facts.num_heads, facts.topk, rows=1)
    return Access(how.layout, "direct" if copied is None else "fastest", "PAGED")


def _default(phase: Phase, facts: SharedFacts) -> tuple[str, str]:
    if facts.hisparse:
        backend = dict(HISPARSE_BACKENDS)[facts.layout]
        return backend, f"the backend for HiSparse over {facts.layout.name}"
    names = default_names(phase, facts.layout, facts.platform)
    rows = [row for row in map(find_backend, names) if row is not None]
    backend = next(row.name for row in rows if fits(row, facts))
    why = f"the default for a {facts.layout.name} cache on {describe_platform(facts.platform)}"
    if backend != names[0]:
        cause = "attention sinks" if facts.sinks else f"page_size={facts.page_size}"
        why += f" where {names[0]} does not take {cause}"
    return backend, why


def _how_it_reads(how: Access, facts: SharedFacts) -> str:
    match how.indices, how.reads:
        case "PAGE_TABLE", "direct":
            return "dense: attends to every token of the page table, whatever the selection"
        case "PAGE_TABLE", _:
            return (
                "dense: attends to every token of the page table, whatever the selection, and "
                "dequantises what it reads to BF16"
            )
        case "RAGGED", _:
            return (
                f"gathers the batch's tokens once and dequantises them from {how.layout.name} to "
                "BF16; RAGGED: positions become rows of that buffer"
            )
        case _, "gather_dequantize":
            return (
                f"gathers the selected slots only and dequantises them from {how.layout.name} to "
                "BF16; PAGED: positions become slots through the page table"
            )
        case _, "fastest":
            least = [
                _prefill_reads.first_gathering(how.layout, facts.num_heads, facts.topk, rows)
                for rows in _ROOMS
            ]
            return (
                f"reads {how.layout.name} rows in place, or gathers the batch's tokens once and "
                f"dequantises them to BF16 where that was faster on an H200: with "
                f"{facts.num_heads} heads from {least[0]} new tokens on if the page table has room "
                f"for {_ROOMS[0]}, from {least[1]} on for {_ROOMS[1]}; PAGED: positions become "
                "slots through the page table, or rows of the copies"
            )
        case _, "convert":
            return (
                f"re-packs the pages that the batch touches from {how.layout.name} to block-scale "
                "rows, exactly, and leaves the cache as it is; PAGED: positions become slots of "
                "the copies"
            )
    return (
        f"reads {how.layout.name} rows in place; PAGED: positions become slots through the page "
        "table"
    )


def _what_runs(backend: str, phase: Phase, how: Access, facts: SharedFacts) -> str:
    if facts.implementation is not None:
        return f"runs on implementation={facts.implementation!r}, as named"
    where = describe_platform(facts.platform)
    if not any(facts.platform in kernel.platforms for kernel in kernels_of(backend, phase)):
        return f"runs on XLA: no device kernel serves {backend} {phase} on {where}"
    if not kernels_reading(phase, how):
        return f"runs on XLA: no device kernel serves {backend} {phase} over {how.layout.name}"
    reasons = layout_reasons(facts.layout, facts.rank, facts.rope_dim)
    if reasons:
        return f"runs on XLA: {'; '.join(reasons)}"
    in_place = how.reads == "gather_dequantize" and how.indices != "RAGGED"
    copies = ", which makes no dequantised copies" * in_place
    return f"runs on the device kernel for {where}{copies}"
