"""resolve(): from a config to a plan, each choice with its reason, each refusal with a way out.

The layout is decided first, from the dtype, the platform and the backends that the config names,
since it is what the phases share. Then each phase is decided by itself, from its own setting and
the shared facts. The table itself is `jmla.backends`.
"""

import dataclasses
import itertools
import warnings
from typing import Any, overload

from jmla.backends import (
    PHASES,
    Phase,
    backends_of,
    serves,
)
from jmla.config import KV_CACHE_DTYPES, Config, GQAConfig
from jmla.dispatch.changes import Setting, accepted_changes
from jmla.dispatch.explain import explain
from jmla.dispatch.fp4 import (
    FP4CompatibilityError,
    FP4CompatibilityWarning,
    fp4_pair_warning,
    fp4_problems,
)
from jmla.dispatch.gqa import resolve_gqa
from jmla.dispatch.layout_choice import LayoutChoice, choose_layout
from jmla.dispatch.phase_choice import PhaseChoice, SharedFacts, choose_phase
from jmla.dispatch.requirements import (
    attention_problems,
    backend_problems,
    hisparse_problems,
    kernel_problems,
    name_problems,
)
from jmla.gqa_plan import GQAPlan
from jmla.layouts.base import KVLayout
from jmla.phase_plan import DecodePlan, PrefillPlan
from jmla.plan import Plan
from jmla.platforms import describe_platform, detect_platform

_SETTINGS: tuple[Setting, ...] = (
    ("kv_cache_dtype", "auto", KV_CACHE_DTYPES[1:]),
    ("layout", None, tuple(KVLayout)),
    ("prefill_backend", None, backends_of("prefill")),
    ("decode_backend", None, backends_of("decode")),
    ("page_size", 64, (32,)),
    ("implementation", None, ("xla", "reference")),
    ("hisparse", None, ()),
    ("attention", "mla", ()),
)


@dataclasses.dataclass(frozen=True)
class _Problem:
    text: str
    error: type[Exception] = ValueError


@overload
def resolve(config: Config) -> Plan: ...


@overload
def resolve(config: GQAConfig) -> GQAPlan: ...


def resolve(config: Config | GQAConfig) -> Plan | GQAPlan:
    """Decides everything that a config leaves open, or says why it cannot work.

    Args:
        config: see `Config`, and `GQAConfig` for keys and values of several heads;
            `platform="auto"` is the platform of JAX's default device.

    Returns:
        The plan. `str(plan)` tells each choice and its reason.

    Raises:
        ValueError: the settings cannot work together. The message lists every reason, and the
            changes that would be accepted.
        FP4CompatibilityError: likewise, and one reason is the FP4 cache. It is a ValueError.
        NotImplementedError: the named implementation, and nothing else, is in the way.

    Warns:
        FP4CompatibilityWarning: two different backends share an FP4 cache.
    """
    platform = _platform(config)
    if isinstance(config, GQAConfig):
        return resolve_gqa(config, platform)
    plan = _attempt(config, platform)
    if isinstance(plan, Plan):
        for warning in plan.warnings:
            warnings.warn(warning, FP4CompatibilityWarning, stacklevel=2)
        return dataclasses.replace(plan, explanation=explain(plan))
    errors = {problem.error for problem in plan}
    error: type[Exception] = ValueError
    if FP4CompatibilityError in errors:
        error = FP4CompatibilityError
    elif errors == {NotImplementedError}:
        error = NotImplementedError
    lines = [
        f"jmla cannot serve this config on {describe_platform(platform)}:",
        *(f"- {problem.text}" for problem in plan),
        "Any one of these changes is accepted instead:",
        *(f"- {change}" for change in alternatives(config)),
    ]
    raise error("\n".join(lines))


def alternatives(config: Config) -> tuple[str, ...]:
    """The changes that make a config resolve, each line being enough by itself.

    A line is one setting with every value that is accepted for it while the rest stays; or, where
    no single setting is enough, the fewest that have to be given back to jmla together.
    """
    platform = _platform(config)

    def accepted(changes: dict[str, Any]) -> bool:
        changed = dataclasses.replace(config, **changes)
        return changed != config and isinstance(_attempt(changed, platform), Plan)

    return accepted_changes(_SETTINGS, accepted)


def valid_pairs(config: Config) -> tuple[tuple[str, str], ...]:
    """Every (prefill, decode) pair of backends that resolves while the rest of `config` stays."""
    platform = _platform(config)
    return tuple(
        (prefill, decode)
        for prefill, decode in itertools.product(backends_of("prefill"), backends_of("decode"))
        if isinstance(
            _attempt(
                dataclasses.replace(config, prefill_backend=prefill, decode_backend=decode),
                platform,
            ),
            Plan,
        )
    )


def _platform(config: Config | GQAConfig) -> str:
    return detect_platform() if config.platform == "auto" else config.platform


def _attempt(config: Config, platform: str) -> Plan | list[_Problem]:
    """The plan of a config, or everything that is in its way."""
    named: dict[Phase, str | None] = {
        "prefill": config.prefill_backend,
        "decode": config.decode_backend,
    }
    served = {
        phase: name if name and serves(name, phase) else None for phase, name in named.items()
    }
    cache = choose_layout(config, platform, served["prefill"], served["decode"])

    texts = attention_problems(config)
    fp4_texts = []
    if config.kv_cache_dtype == "fp4_e2m1" or config.layout is KVLayout.FP4:
        fp4_texts = fp4_problems(config, platform)
    else:
        for phase in PHASES:
            texts += name_problems(phase, named[phase])
    for phase in PHASES:
        texts += backend_problems(phase, named[phase], config)
    if not fp4_texts:  # they tell the same, with the history of the rule
        texts += cache.problems
    texts += hisparse_problems(config, cache.layout)
    problems = [_Problem(text, FP4CompatibilityError) for text in fp4_texts]
    problems += [_Problem(text) for text in texts]
    if problems or cache.layout is None:
        kernels = kernel_problems(config, platform, served, cache.layout)
        return problems + [_Problem(text, NotImplementedError) for text in kernels]

    facts = SharedFacts.of(config, cache.layout, platform)
    prefill = choose_phase("prefill", served["prefill"], facts)
    decode = choose_phase("decode", served["decode"], facts)
    backends: dict[Phase, str | None] = {"prefill": prefill.backend, "decode": decode.backend}
    kernels = kernel_problems(config, platform, backends, cache.layout)
    if kernels:
        return [_Problem(text, NotImplementedError) for text in kernels]
    return _plan(config, facts, cache, prefill, decode)


def _plan(
    config: Config,
    facts: SharedFacts,
    cache: LayoutChoice,
    prefill: PhaseChoice,
    decode: PhaseChoice,
) -> Plan:
    warning = None
    if facts.layout is KVLayout.FP4:
        warning = fp4_pair_warning(prefill.backend, decode.backend)
    return Plan(
        config=config,
        platform=facts.platform,
        layout=facts.layout,
        layout_reason=cache.reason,
        prefill=PrefillPlan(
            phase="prefill", num_splits=None, hisparse=False, **_common(config, prefill)
        ),
        decode=DecodePlan(
            phase="decode",
            num_splits=config.num_splits,
            hisparse=config.hisparse is not None,
            **_common(config, decode),
        ),
        warnings=() if warning is None else (warning,),
    )


def _common(config: Config, choice: PhaseChoice) -> dict[str, Any]:
    return {
        "backend": choice.backend,
        "implementation": config.implementation,
        "layout": choice.access.layout,
        "index_transform": choice.access.indices,
        "reads": choice.access.reads,
        "num_heads": config.num_heads,
        "sm_scale": config.sm_scale,
        "page_size": config.page_size,
        "attn_sink": config.attn_sink,
        "reasons": choice.reasons,
    }
