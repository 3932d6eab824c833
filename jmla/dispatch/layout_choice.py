"""Which layout the cache gets: the one thing that the two phases of a plan share."""

import dataclasses

from jmla.backends import (
    HISPARSE_BACKENDS,
    LAYOUTS_OF_DTYPE,
    PHASES,
    Phase,
    backends_of,
    dtype_of,
    find_backend,
    layouts_read,
    sizes_problem,
)
from jmla.config import Config, quote
from jmla.layouts.base import KVLayout
from jmla.platforms import describe_platform, is_blackwell

_BF16 = KVLayout.BF16
_RAW = KVLayout.FP8_NOPE_FP8_ROPE
_BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE


@dataclasses.dataclass(frozen=True)
class LayoutChoice:
    """The layout, or None if there are problems that leave none; and why."""

    layout: KVLayout | None
    reason: str
    problems: tuple[str, ...] = ()


def choose_layout(
    config: Config, platform: str, prefill: str | None, decode: str | None
) -> LayoutChoice:
    """The first layout, in the dtype's order, that all named backends read.

    Args:
        config: its dtype, pinned layout, sizes, sinks and HiSparse.
        platform: a concrete platform.
        prefill: the named prefill backend, one that serves the phase, or None.
        decode: likewise.
    """
    named: dict[Phase, str | None] = {"prefill": prefill, "decode": decode}
    candidates, source = _candidates(config, platform, named)
    if not candidates:
        return LayoutChoice(None, source, (source,))
    passed_over = []
    for layout in candidates:
        unable = [
            f"{phase}_backend={name!r}"
            for phase, name in named.items()
            if name is not None and layout not in layouts_read(name, phase)
        ]
        wrong_size = sizes_problem(layout, config.kv_lora_rank, config.rope_dim)
        if unable:
            passed_over.append(f"not {layout.name}, which {' and '.join(unable)} cannot read")
        elif wrong_size and config.kv_cache_dtype == "auto" and config.layout is None:
            passed_over.append(f"not {layout.name}: {wrong_size}")
        elif wrong_size:
            return LayoutChoice(None, source, (f"{layout.name} ({source}): {wrong_size}",))
        else:
            return LayoutChoice(layout, "; ".join([source, *passed_over, *_remarks(layout)]))
    return LayoutChoice(None, source, (_no_layout(source, candidates, named),))


def _candidates(
    config: Config, platform: str, named: dict[Phase, str | None]
) -> tuple[tuple[KVLayout, ...], str]:
    """The layouts that the dtype may mean, best first, and what makes them the candidates."""
    dtype = config.kv_cache_dtype
    if config.layout is not None:
        source = f"pinned by layout=KVLayout.{config.layout.name}"
        stored = dtype_of(config.layout)
        if dtype not in ("auto", stored):
            return (), (
                f"layout=KVLayout.{config.layout.name} stores {stored!r}, but "
                f"{config.kv_cache_dtype=}: expected 'auto' or {stored!r}"
            )
        return (config.layout,), source
    if dtype != "auto":
        if dtype == "fp8_e4m3":
            layouts = _fp8(config, platform, named)
        else:
            layouts = next(found for name, found in LAYOUTS_OF_DTYPE if name == dtype)
        return layouts, f"kv_cache_dtype={dtype!r}"

    where = describe_platform(platform)
    if config.attn_sink:
        layouts = (_BF16, *_fp8(config, platform, named))
        source = "kv_cache_dtype='auto' is bfloat16 for a model with attention sinks"
    elif "trtllm" in named.values():
        layouts = (_RAW, _BF16)
        source = (
            "kv_cache_dtype='auto' takes the FP8 row that trtllm is made for, if all can read it; "
            "'bfloat16' keeps full precision"
        )
    elif is_blackwell(platform):
        layouts = (*_fp8(config, platform, named), _BF16)
        source = f"kv_cache_dtype='auto' is fp8_e4m3 on {where}"
    else:
        layouts = (_BF16, *_fp8(config, platform, named))
        source = f"kv_cache_dtype='auto' is bfloat16 on {where}"
    if config.hisparse is not None:
        layouts = _routed(layouts, named)
    return layouts, source


def _routed(layouts: tuple[KVLayout, ...], named: dict[Phase, str | None]) -> tuple[KVLayout, ...]:
    """The layouts with those first whose backend for HiSparse is what the config names."""
    routes = dict(HISPARSE_BACKENDS)
    unlike = {layout: set(named.values()) - {None, routes[layout]} for layout in layouts}
    return tuple(sorted(layouts, key=lambda layout: bool(unlike[layout])))


def _fp8(config: Config, platform: str, named: dict[Phase, str | None]) -> tuple[KVLayout, ...]:
    """Block scales are the more exact; the plain row is what Blackwell's default backend reads."""
    trtllm = find_backend("trtllm")
    assert trtllm is not None
    by_default = (
        is_blackwell(platform)
        and None in named.values()
        and config.page_size in trtllm.page_sizes
        and not config.attn_sink
    )
    if config.hisparse is not None:
        return (_BLOCK,)
    return (_RAW, _BLOCK) if by_default else (_BLOCK, _RAW)


def _remarks(layout: KVLayout) -> list[str]:
    """What a user should know who sees this layout for the first time."""
    if layout is _RAW:
        return ["no scales are stored: latents beyond 448 are clipped"]
    if layout is KVLayout.FP4:
        return ["4 bits a value cost accuracy: measure it on your model"]
    return []


def _no_layout(
    source: str, candidates: tuple[KVLayout, ...], named: dict[Phase, str | None]
) -> str:
    names = " or ".join(layout.name for layout in candidates)
    reads = [
        f"{phase}_backend={name!r} reads {', '.join(x.name for x in layouts_read(name, phase))}"
        for phase, name in named.items()
        if name is not None
    ]
    text = f"the cache would be {names} ({source}), but {' and '.join(reads)}"
    for phase in PHASES:
        able = tuple(
            name
            for name in backends_of(phase)
            if any(layout in layouts_read(name, phase) for layout in candidates)
        )
        if named[phase] is not None and named[phase] not in able:
            text += f"; {phase} backends that read such a cache: {quote(able)}"
    return text
