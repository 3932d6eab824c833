"""What a refusal proposes: changes of a config that are enough by themselves."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jmla.config import quote

Setting = tuple[str, Any, tuple[Any, ...]]
"""A setting, the value that gives the choice back to jmla, and others."""


def accepted_changes(
    settings: Sequence[Setting], accepted: Callable[[dict[str, Any]], bool]
) -> tuple[str, ...]:
    """The changes that make a config resolve, each line being enough by itself.

    A line is one setting with every value that is accepted for it while the rest stays; or, where
    no single setting is enough, the fewest that have to be given back to jmla together.

    Args:
        settings: that may be changed.
        accepted: whether a config with these changes resolves, and differs from the first.
    """
    lines = []
    for name, default, others in settings:
        values = tuple(value for value in (default, *others) if accepted({name: value}))
        if values:
            lines.append(f"{name}={quote(values)}")
    if lines:
        return tuple(lines)
    defaults = {name: default for name, default, _ in settings}
    for count in range(2, len(settings) + 1):
        for names in itertools.combinations(defaults, count):
            if accepted({name: defaults[name] for name in names}):
                changes = [f"{name}={defaults[name]!r}" for name in names]
                lines.append(f"{', '.join(changes[:-1])} and {changes[-1]} together")
        if lines:
            break
    return tuple(lines)
