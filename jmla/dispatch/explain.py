"""A plan in words."""

import textwrap

from jmla.layouts.base import KVLayout
from jmla.phase_plan import PhasePlan
from jmla.plan import Plan
from jmla.platforms import describe_platform

_WIDTH = 100


def explain(plan: Plan) -> str:
    """What was chosen for each phase and for the cache, why, and what to look out for."""
    config = plan.config
    heads = f"{config.num_heads} query head{'s' * (config.num_heads != 1)}"
    sinks = ", attention sinks" * config.attn_sink
    lines = [
        f"jmla plan for {describe_platform(plan.platform)}: {heads} per device, "
        f"sm_scale {config.sm_scale:.6g}, top-k {config.index_topk}{sinks}",
        *_section("cache", _cache_title(plan), (plan.layout_reason,)),
        *_section("prefill", _phase_title(plan.prefill), plan.prefill.reasons),
        *_section("decode", _phase_title(plan.decode), plan.decode.reasons),
    ]
    if config.hisparse is not None:
        rows = config.hisparse.buffer_rows(config.index_topk)
        title = f"{rows} rows of a request on the device, the rest in host memory"
        ratio = config.hisparse.host_to_device_ratio
        lines += _section("hisparse", title, (f"host memory holds {ratio} times the tokens",))
    for warning in plan.warnings:
        lines += _wrap("warning  ", warning)
    return "\n".join(lines)


def _cache_title(plan: Plan) -> str:
    config = plan.config
    latent = plan.layout.bytes_per_token(config.kv_lora_rank, config.rope_dim)
    # One e4m3 per value of an index key, and an f32 scale.
    key = 0 if plan.index_dim is None else plan.index_dim + 4
    scales = f", {config.scale_format} scales"
    if plan.layout is not KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE:
        scales = ""
    return (
        f"{plan.layout.name}, pages of {config.page_size}{scales}: {latent + key} bytes per token "
        f"and layer ({latent} latent + {key} index key)"
    )


def _phase_title(phase: PhasePlan) -> str:
    return f"{phase.backend}, {phase.index_transform} indices, reads: {phase.reads}"


def _section(name: str, title: str, reasons: tuple[str, ...]) -> list[str]:
    lines = [f"{name:<9}{title}"]
    for reason in reasons:
        lines += _wrap(" " * 9 + "- ", reason)
    return lines


def _wrap(indent: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )
