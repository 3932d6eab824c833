"""resolve() for keys and values of several heads: one phase, from the MHA half of the table."""

import dataclasses
from typing import Any

from jmla._mosaic_gqa import head_dim_reasons
from jmla.backends import (
    HEADS_BACKENDS,
    HEADS_ENGINE_BACKENDS,
    HEADS_PLATFORMS,
    find_heads_backend,
)
from jmla.config import KV_CACHE_DTYPES, GQAConfig, quote
from jmla.dispatch.changes import Setting, accepted_changes
from jmla.dispatch.fp4 import FP4CompatibilityError, engine_history
from jmla.gqa_plan import GQAPlan
from jmla.layouts.base import FP4_BLOCK
from jmla.platforms import describe_platform

_NAMES = tuple(backend.name for backend in HEADS_BACKENDS)
_SETTINGS: tuple[Setting, ...] = (
    ("kv_cache_dtype", "auto", KV_CACHE_DTYPES[1:]),
    ("prefill_backend", None, ()),
    ("decode_backend", None, _NAMES),
    ("page_size", 64, (16, 32)),
    ("implementation", None, ("xla", "reference")),
)


def resolve_gqa(config: GQAConfig, platform: str) -> GQAPlan:
    """The plan of a config on a concrete platform, or why there is none; see `jmla.resolve`."""
    settings = _setting_problems(config)
    kernel = _kernel_problems(config, platform)
    if not settings and not kernel:
        return _plan(config, platform)
    error: type[Exception] = ValueError
    if settings and config.kv_cache_dtype == "fp4_e2m1":
        error = FP4CompatibilityError
    elif not settings:
        error = NotImplementedError

    def accepted(changes: dict[str, Any]) -> bool:
        changed = dataclasses.replace(config, **changes)
        problems = [*_setting_problems(changed), *_kernel_problems(changed, platform)]
        return changed != config and not problems

    lines = [
        f"jmla cannot serve this config on {describe_platform(platform)}:",
        *(f"- {problem}" for problem in [*settings, *kernel]),
        "Any one of these changes is accepted instead:",
        *(f"- {change}" for change in accepted_changes(_SETTINGS, accepted)),
    ]
    raise error("\n".join(lines))


def _setting_problems(config: GQAConfig) -> list[str]:
    dtype, problems = _dtype(config), []
    if config.prefill_backend is not None:
        problems.append(
            f"prefill_backend={config.prefill_backend!r}: jmla has no prefill over keys and values "
            "of several heads: expected None; attend to a prompt with "
            "jax.nn.dot_product_attention and store it with jmla.quantize_key_values"
        )
    name = config.decode_backend
    row = None if name is None else find_heads_backend(name)
    if name is not None and row is None:
        problems.append(_unknown(name, config))
    if row is not None and row.page_sizes and config.page_size not in row.page_sizes:
        problems.append(
            f"decode_backend={name!r} takes pages of {quote(row.page_sizes)} tokens, but "
            f"page_size={config.page_size}"
        )
    if row is not None and dtype not in row.decode:
        problems.append(
            f"decode_backend={name!r} does not read kv_cache_dtype={dtype!r}: expected "
            f"{quote(row.decode)}"
        )
    if dtype == "fp4_e2m1" and config.head_dim % FP4_BLOCK:
        problems.append(
            f"kv_cache_dtype='fp4_e2m1' has a scale for each {FP4_BLOCK} values of a head, but "
            f"head_dim={config.head_dim}"
        )
    return problems


def _unknown(name: str, config: GQAConfig) -> str:
    known = any(engine.name == name for engine in HEADS_ENGINE_BACKENDS)
    what = "a backend of the serving engines that jmla does not serve" if known else "not known"
    history = ""
    if config.kv_cache_dtype == "fp4_e2m1":
        history = f" ({engine_history('mha', config.prefill_backend, name)})"
    return (
        f"decode_backend={name!r} is {what} over keys and values of several heads: expected "
        f"{quote(_NAMES)}{history}"
    )


def _kernel_problems(config: GQAConfig, platform: str) -> list[str]:
    if config.implementation != "mosaic_gpu":
        return []
    expected = "expected implementation=None, 'xla' or 'reference'"
    reasons = [f"cannot serve decode: {reason}" for reason in head_dim_reasons(config.head_dim)]
    if platform not in HEADS_PLATFORMS:
        reasons.append(
            f"has no kernel for decode over keys and values of several heads on {platform!r} "
            f"(platforms with one: {quote(HEADS_PLATFORMS)})"
        )
    return [f"implementation='mosaic_gpu' {reason}: {expected}" for reason in reasons]


def _plan(config: GQAConfig, platform: str) -> GQAPlan:
    dtype = _dtype(config)
    backend = config.decode_backend or next(
        row.name
        for row in HEADS_BACKENDS
        if dtype in row.decode and config.page_size in (row.page_sizes or (config.page_size,))
    )
    where = describe_platform(platform)
    unserved = head_dim_reasons(config.head_dim)
    if config.implementation is not None:
        runs = f"implementation={config.implementation!r}, as named"
    elif platform not in HEADS_PLATFORMS:
        runs = f"XLA: no device kernel serves it on {where}"
    elif unserved:
        runs = f"XLA: {'; '.join(unserved)}"
    else:
        runs = f"the device kernel for {where}"
    chosen = "as named" if config.decode_backend else "the default"
    reasons = (
        f"jmla plan for {where}: {config.num_heads} query heads and {config.num_kv_heads} heads of "
        f"the cache per device, sm_scale {config.sm_scale:.6g}",
        f"cache    {dtype}, pages of {config.page_size}",
        f"decode   {backend}, {chosen}: reads keys and values in place, through the page table",
        f"         runs on {runs}",
    )
    return GQAPlan(
        config=config, platform=platform, kv_cache_dtype=dtype, backend=backend, reasons=reasons
    )


def _dtype(config: GQAConfig) -> str:
    return "bfloat16" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
