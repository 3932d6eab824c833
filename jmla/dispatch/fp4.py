"""Which backends may share an FP4 cache, and where these rules come from.

The serving engine's first rule (December 2025) refused FP4 off CUDA and checked the backend
against a list, one for MLA and one for MHA, with a shorter one if fa4 did the prefill. A pair of
two different backends was not checked at all: it got a warning that problems were improbable, so
that a pair such as fa3 and triton, neither of which reads FP4 latents, went through to fail later.
flashmla joined the MLA list soon after it was made, once someone had run it on Hopper; a later
release has neither flashmla nor cutlass_mla in it.

jmla keeps the lists, and the warning for mixed pairs, but checks each phase against its own list
first, so that no pair goes through of which a half cannot read FP4. It has no rule against
platforms: XLA reads FP4 anywhere, and only a device kernel needs CUDA.
"""

import dataclasses

from jmla.backends import (
    HEADS_BACKENDS,
    PHASES,
    Phase,
    backends_of,
    find_backend,
    find_heads_backend,
    layouts_read,
)
from jmla.config import Config, quote
from jmla.layouts.base import KVLayout
from jmla.platforms import is_cuda


class FP4CompatibilityError(ValueError):
    """A config asks for an FP4 cache together with something that cannot read one."""


class FP4CompatibilityWarning(UserWarning):
    """An FP4 cache is shared by two different backends."""


@dataclasses.dataclass(frozen=True)
class EngineRule:
    """Which backends a serving engine accepts for an FP4 cache.

    Attributes:
        attention: "mla" or "mha".
        fa4_prefill: whether the rule is the one for fa4 prefill. Then the list is for decode.
        accepted: the engine's list today.
        once: names that were in the list when it was made, and are not any more.
    """

    attention: str
    fa4_prefill: bool
    accepted: tuple[str, ...]
    once: tuple[str, ...] = ()


ENGINE_RULES: tuple[EngineRule, ...] = (
    EngineRule("mla", False, ("flashinfer", "trtllm_mla"), once=("cutlass_mla", "flashmla")),
    EngineRule("mla", True, ("flashinfer", "trtllm_mla"), once=("cutlass_mla",)),
    EngineRule("mha", False, ("triton", "torch_native", "flex_attention", "trtllm_mha")),
    EngineRule("mha", True, ("triton", "torch_native", "flex_attention")),
)


def fp4_backends(attention: str, phase: Phase) -> tuple[str, ...]:
    """The backends of jmla that read an FP4 cache in that phase."""
    if attention != "mla":
        rows = HEADS_BACKENDS if phase == "decode" else ()
        return tuple(row.name for row in rows if "fp4_e2m1" in row.decode)
    return tuple(name for name in backends_of(phase) if KVLayout.FP4 in layouts_read(name, phase))


def fp4_problems(config: Config, platform: str) -> list[str]:
    """Everything about an FP4 config that cannot work, each with what is accepted instead."""
    problems = []
    named = {"prefill": config.prefill_backend, "decode": config.decode_backend}
    kind = config.attention.upper()
    for phase in PHASES:
        name = named[phase]
        accepted = fp4_backends(config.attention, phase)
        if name is None or name in accepted:
            continue
        expected = f"expected {quote(accepted)}" if accepted else "jmla has none for it"
        problems.append(
            f"{phase}_backend={name!r} cannot read an FP4 cache with {kind}: {expected} "
            f"({engine_history(config.attention, named['prefill'], name)})"
        )
    if config.attention != "mla" and not problems:
        engine = quote(_rule(config.attention, fa4_prefill=False).accepted)
        problems.append(
            f"attention={config.attention!r} with an FP4 cache is not what a Config describes (the "
            f"serving engine's backends are {engine}): expected a jmla.GQAConfig, or "
            "attention='mla'"
        )
    if config.implementation == "mosaic_gpu" and not is_cuda(platform):
        problems.append(
            f"implementation='mosaic_gpu' reads FP4 on CUDA only, and {platform=}: expected "
            "implementation=None, 'xla' or 'reference'"
        )
    return problems


def fp4_pair_warning(prefill: str, decode: str) -> str | None:
    """What to tell the user about two resolved backends over one FP4 cache, if anything."""
    if prefill == decode:
        return None
    return (
        f"an FP4 cache is shared by two backends, {prefill!r} prefill and {decode!r} decode. Both "
        "read it, but few have run this pair: compare its results with those of one backend in "
        f"both phases, prefill_backend={decode!r} decode_backend={decode!r}."
    )


def _rule(attention: str, *, fa4_prefill: bool) -> EngineRule:
    return next(
        rule
        for rule in ENGINE_RULES
        if rule.attention == attention and rule.fa4_prefill == fa4_prefill
    )


def engine_history(attention: str, prefill: str | None, name: str) -> str:
    """What the serving engine's list for an FP4 cache says of a backend, and once said."""
    fa4 = prefill == "fa4"
    rule = _rule(attention, fa4_prefill=fa4)
    where = "the serving engine's list" + (" of decode backends behind fa4 prefill" if fa4 else "")
    if name in rule.accepted:
        verdict = f"{name!r} is in it, but jmla does not serve that backend"
    elif name in rule.once:
        verdict = f"{name!r} was in it once"
    elif find_backend(name) is None and find_heads_backend(name) is None:
        verdict = f"{name!r} is not in it"
    else:
        verdict = f"{name!r} is not in it; in a mixed pair the engine let it pass unchecked"
    return f"{where} is {quote(rule.accepted)}: {verdict}"
