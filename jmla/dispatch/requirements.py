"""What backends ask of a config apart from the layout: each unmet requirement as a sentence."""

from collections.abc import Mapping

from jmla._mosaic_decode import layout_reasons
from jmla.backends import (
    BACKENDS,
    ENGINE_BACKENDS,
    HISPARSE_BACKENDS,
    PHASES,
    Phase,
    backends_of,
    dtype_of,
    find_backend,
    kernels_of,
    kernels_over,
    serves,
)
from jmla.config import Config, quote
from jmla.layouts.base import KVLayout


def attention_problems(config: Config) -> list[str]:
    """Why jmla has nothing for this kind of attention, if it has not."""
    if config.attention == "mla":
        return []
    return [
        f"attention={config.attention!r}: a Config describes latent attention: expected "
        "attention='mla', or a jmla.GQAConfig for keys and values of several heads"
    ]


def name_problems(phase: Phase, name: str | None) -> list[str]:
    """Why a name does not stand for a backend of that phase, if it does not."""
    if name is None or serves(name, phase):
        return []
    accepted = quote(backends_of(phase))
    if find_backend(name) is not None:
        other = "prefill" if phase == "decode" else "decode"
        return [f"{phase}_backend={name!r} serves {other} only: expected {accepted}"]
    for engine in ENGINE_BACKENDS:
        if engine.name == name:
            nearest = tuple(near for near in engine.nearest if serves(near, phase))
            return [
                f"{phase}_backend={name!r} is a backend of the serving engines that jmla does not "
                f"serve: the nearest is {quote(nearest)}; expected {accepted}"
            ]
    return [f"{phase}_backend={name!r} is not a known backend: expected {accepted}"]


def backend_problems(phase: Phase, name: str | None, config: Config) -> list[str]:
    """What a named backend asks of page size and sinks that the config does not give."""
    row = find_backend(name) if name is not None else None
    if row is None:
        return []
    problems = []
    if row.page_sizes and config.page_size not in row.page_sizes:
        problems.append(
            f"{phase}_backend={name!r} takes pages of {quote(row.page_sizes)} tokens, but "
            f"page_size={config.page_size}"
        )
    if config.attn_sink and not row.sinks and not row.picks:
        able = tuple(b.name for b in BACKENDS if (b.sinks or b.picks) and serves(b.name, phase))
        problems.append(
            f"{phase}_backend={name!r} does not add attention sinks, but attn_sink=True: expected "
            f"{quote(able)}"
        )
    return problems


def hisparse_problems(config: Config, layout: KVLayout | None) -> list[str]:
    """What HiSparse asks of dtype, backends and sizes that the config does not give.

    Args:
        config: the config.
        layout: the layout of the cache, or None if none could be chosen.
    """
    if config.hisparse is None:
        return []
    problems = []
    routes = dict(HISPARSE_BACKENDS)
    if layout is not None:
        accepted: tuple[str, ...] = (routes[layout],)
    else:
        of_dtype = [b for entry, b in routes.items() if dtype_of(entry) == config.kv_cache_dtype]
        accepted = tuple(of_dtype[:1]) or tuple(dict.fromkeys(routes.values()))
    told = ", ".join(f"{entry.name} -> {backend!r}" for entry, backend in HISPARSE_BACKENDS)
    for phase, name in (("prefill", config.prefill_backend), ("decode", config.decode_backend)):
        if name is not None and name not in accepted:
            problems.append(
                f"{phase}_backend={name!r} does not serve hisparse with "
                f"kv_cache_dtype={config.kv_cache_dtype!r}: expected {quote(accepted)} (each "
                f"layout has its own: {told})"
            )
    if config.attn_sink and accepted == ("flashmla_kv",):
        problems.append(
            "hisparse with an FP8 cache runs on flashmla_kv, which does not add attention sinks, "
            "but attn_sink=True: expected kv_cache_dtype='bfloat16'"
        )
    rows = config.hisparse.buffer_rows(config.index_topk)
    if rows < config.index_topk:
        problems.append(
            f"hisparse.device_buffer_size={rows}: expected at least "
            f"index_topk={config.index_topk}, or the rows of one step do not fit in a request's "
            "buffer"
        )
    return problems


def kernel_problems(
    config: Config,
    platform: str,
    backends: Mapping[Phase, str | None],
    layout: KVLayout | None,
) -> list[str]:
    """Which phases have no device kernel, if the config names that implementation.

    Args:
        config: the config.
        platform: a concrete platform.
        backends: the backend of each phase; None if it is not decided.
        layout: the layout of the cache, or None if none could be chosen.
    """
    if config.implementation != "mosaic_gpu":
        return []
    problems = []
    expected = "expected implementation=None, 'xla' or 'reference'"
    for phase in PHASES:
        name = backends[phase]
        # Of a phase that is not decided it is only known when no backend would do.
        names = backends_of(phase) if name is None else (name,)
        kernels = [kernel for each in names for kernel in kernels_of(each, phase)]
        reasons = []
        if not any(platform in kernel.platforms for kernel in kernels):
            where = tuple(sorted({platform for kernel in kernels for platform in kernel.platforms}))
            reasons = [
                f"has no kernel for {name or 'any'} {phase} on {platform!r} (platforms with one: "
                f"{quote(where) or 'none yet'})"
            ]
        elif layout is not None and not any(kernels_over(each, phase, layout) for each in names):
            reasons = [f"has no kernel for {name or 'any'} {phase} over {layout.name}"]
        elif layout is not None:
            reasons = [
                f"cannot serve {name or 'any'} {phase}: {reason}"
                for reason in layout_reasons(layout, config.kv_lora_rank, config.rope_dim)
            ]
        problems += [f"implementation='mosaic_gpu' {reason}: {expected}" for reason in reasons]
    return problems
