"""What timers make of the kernels that a profiler reports; the profilers need a GPU."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from benchmarks.timing import (
    Call,
    Kernel,
    KernelSumTimer,
    MeasurementError,
    Timer,
    Wait,
    WallTimer,
    per_call,
    traced_kernels,
)

BINDINGS = "jax._src.lib.mosaic_gpu"


def kernels(*names: str) -> list[Kernel]:
    return [Kernel(name, float(i), float(i + 1)) for i, name in enumerate(names)]


def test_kernels_are_dealt_to_their_calls():
    groups = per_call(kernels("split", "combine", "combine", "split"), 2, "a case")
    assert [[kernel.start_us for kernel in group] for group in groups] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("names", [("a", "b", "a"), ("a", "b", "a", "a")])
def test_calls_of_different_kernels_are_refused(names: tuple[str, ...]):
    with pytest.raises(MeasurementError, match=r"a case: .* not the same in each: \{'a': "):
        per_call(kernels(*names), 2, "a case")


def test_no_kernels_is_an_error_and_not_a_time_of_zero():
    with pytest.raises(MeasurementError, match="flashmla: no kernel was seen in 30 calls"):
        per_call([], 30, "flashmla")


def test_a_trace_s_kernels_are_those_of_the_streams_of_gpus():
    def line(name: str, *events: tuple[str, int, int]) -> Any:
        return SimpleNamespace(
            name=name,
            events=[SimpleNamespace(name=n, start_ns=s, duration_ns=d) for n, s, d in events],
        )

    trace: Any = SimpleNamespace(
        planes=[
            SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("host", 0, 9))]),
            SimpleNamespace(
                name="/device:GPU:0",
                lines=[
                    line("Stream #8(Compute)", ("combine", 3000, 500)),
                    line("XLA Modules", ("jit_f", 1000, 2500)),
                    line("Stream #7(Compute)", ("split", 1000, 1500)),
                ],
            ),
        ]
    )
    assert traced_kernels(trace) == [Kernel("split", 1.0, 2.5), Kernel("combine", 3.0, 3.5)]


def test_inputs_rotate_through_warmup_and_measurement():
    @dataclasses.dataclass(frozen=True)
    class Listed(Timer):
        @property
        def method(self) -> str:
            return "listed"

        def samples(self, calls: Iterator[Call], wait: Wait, what: str) -> list[float]:
            self._call_all(calls, wait)
            return [3.0, 1.0, 2.0]

    made: list[int] = []
    waited: list[object] = []
    calls = itertools.cycle(
        [lambda: made.append(0), lambda: made.append(1), lambda: made.append(2)]
    )
    timer = Listed(warmup=2, calls=3, cooldown_s=0.0)
    assert timer.measure(calls, waited.append, what="a case") == 2.0
    assert made == [0, 1, 2, 0, 1]
    assert len(waited) == 5


def test_wall_time():
    timer = WallTimer(warmup=1, calls=3, cooldown_s=0.0)
    microseconds = timer.measure(
        itertools.repeat(lambda: jax.numpy.arange(8)), jax.block_until_ready, what="arange"
    )
    assert 0.0 < microseconds < 1e6


def test_a_timer_needs_calls():
    with pytest.raises(ValueError, match=r"self\.calls=0"):
        WallTimer(calls=0).measure(itertools.repeat(int), print, what="nothing")


def test_without_bindings_cupti_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, BINDINGS, None)
    timer = KernelSumTimer(warmup=1, calls=1, cooldown_s=0.0)
    with pytest.raises(MeasurementError, match="CUPTI cannot be had"):
        timer.measure(itertools.repeat(int), lambda _: None, what="nothing")


def test_a_call_s_kernels_are_summed(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []

    def timings(finalize: bool) -> list[tuple[str, float]]:
        log.append("end")
        return [("split", 0.25), ("combine", 0.5), ("split", 1.25), ("combine", 0.5)]

    bindings: Any = SimpleNamespace(
        _mosaic_gpu_ext=SimpleNamespace(
            _cupti_init=lambda: log.append("begin"), _cupti_get_timings=timings
        )
    )
    monkeypatch.setitem(sys.modules, BINDINGS, bindings)
    timer = KernelSumTimer(warmup=1, calls=2, cooldown_s=0.0)
    calls = itertools.repeat(lambda: log.append("call"))
    # Milliseconds come, microseconds go: the median of 750 and 1750.
    assert timer.measure(calls, lambda _: None, what="a case") == 1250.0
    assert log == ["call", "begin", "call", "call", "end"]
