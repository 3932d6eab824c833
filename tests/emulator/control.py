"""Loops and branches of `pallas_kernels.device.simt`, run in place of emitted."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emulator.faults import Fault
from tests.emulator.lanes import Lanes
from tests.emulator.warpgroup import current


class Control:
    """The functions, for the class `Value` of one copy of that module."""

    def __init__(self, simt: Any) -> None:
        self._simt = simt

    def loop(
        self, lower: Any, upper: Any, carry: Sequence[Any], body: Callable[..., Sequence[Any]]
    ) -> list[Any]:
        start = lower if isinstance(lower, int) else _uniform(lower)
        values = list(carry)
        bounds = upper.ir.array.view(np.int32)
        for i in range(start, int(bounds[current().mask].max())):
            runs = bounds > i
            with current().only(runs):
                results = list(body(self._simt.i32(i), *values))
            values = results if runs.all() else self._chosen_where(runs, results, values)
        return values

    def when(self, condition: Any, body: Callable[[], None]) -> None:
        with current().only(condition.ir.array) as any_run:
            if any_run:
                body()

    def branch(
        self, condition: Any, otherwise: Sequence[Any], body: Callable[[], Sequence[Any]]
    ) -> list[Any]:
        with current().only(condition.ir.array) as any_run:
            results = list(body()) if any_run else list(otherwise)
        return self._chosen(condition, results, otherwise)

    def either(
        self,
        condition: Any,
        words: int,
        body: Callable[[], Sequence[Any]],
        other: Callable[[], Sequence[Any]],
    ) -> list[Any]:
        results: list[Sequence[Any]] = []
        for chosen, emit in ((condition.ir.array, body), (~condition.ir.array, other)):
            with current().only(chosen) as any_run:
                results.append((emit() or ()) if any_run else [self._simt.i32(0)] * words)
        return self._chosen(condition, *results)

    def _chosen(self, condition: Any, a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
        select = self._simt.select
        return [x if x is y else select(condition, x, y) for x, y in zip(a, b, strict=True)]

    def _chosen_where(self, holds: np.ndarray, a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
        return self._chosen(self._simt.Value(Lanes(holds)), a, b)


def _uniform(value: Any) -> int:
    """The one number of all threads that run."""
    lanes: Lanes = value.ir
    numbers = lanes.array[current().mask].view(np.int32)
    if (numbers != numbers[0]).any():
        raise Fault(f"{numbers=}: expected one bound of a loop for all threads")
    return int(numbers[0])
