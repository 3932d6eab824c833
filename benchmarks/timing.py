"""Time of one call, by the same method for JAX, PyTorch and CUDA code of one process.

A *call* is a function without arguments that starts work on the device. Calls come from an endless
iterator that rotates their inputs, so that no cache flatters them, and each one is waited for
before the next begins.
"""

import abc
import dataclasses
import gc
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

Call = Callable[[], object]
Wait = Callable[[object], object]
"""Returns when the result of a call is there: `jax.block_until_ready`, a device's synchronize."""


class MeasurementError(RuntimeError):
    """A case that could not be measured; what it would have given is not to be used."""


class Kernel(NamedTuple):
    """One kernel, copy or memset of the device; microseconds, from any common origin."""

    name: str
    start_us: float
    end_us: float


@dataclasses.dataclass(frozen=True)
class Timer(abc.ABC):
    """Median time of a call.

    Attributes:
        warmup: calls before the measured ones: they compile, allocate and raise the clocks.
        calls: measured calls.
        cooldown_s: rest before them, so that one case's heat is not the next one's clock.
        heat_s: the same calls for so long just before the measured ones. A GPU whose power is
            limited lowers its clock under load, within about a second: the layers of a long
            prompt run at that clock, a short series after a rest at a higher one. Only times of
            the same `heat_s` can be compared.
    """

    warmup: int = 10
    calls: int = 32
    cooldown_s: float = 0.3
    heat_s: float = 0.0

    def measure(self, calls: Iterator[Call], wait: Wait, *, what: str) -> float:
        """Microseconds of one call.

        Args:
            calls: endless; `warmup + calls` are taken from it.
            wait: waits for the result of a call.
            what: names the calls in an error.

        Raises:
            MeasurementError: nothing was measured, or not the same work in each call.
        """
        if self.calls < 1 or self.warmup < 1:
            raise ValueError(f"{self.calls=} {self.warmup=}: expected at least 1 of each")
        time.sleep(self.cooldown_s)
        for _ in range(self.warmup):
            wait(next(calls)())
        gc.collect()
        end = time.perf_counter() + self.heat_s
        while self.heat_s and time.perf_counter() < end:
            wait(next(calls)())
        return statistics.median(self.samples(calls, wait, what))

    @property
    @abc.abstractmethod
    def method(self) -> str:
        """What a number of this timer is, for a reader of the results."""

    @abc.abstractmethod
    def samples(self, calls: Iterator[Call], wait: Wait, what: str) -> list[float]:
        """Microseconds of each of `self.calls` calls."""

    @property
    def _after(self) -> str:
        return f", after {self.heat_s:g} s of the same calls" if self.heat_s else ""

    def _call_all(self, calls: Iterator[Call], wait: Wait) -> None:
        for _ in range(self.calls):
            wait(next(calls)())


@dataclasses.dataclass(frozen=True)
class KernelSumTimer(Timer):
    """CUPTI's duration of each kernel, summed over a call.

    Copies and memsets are not in the sum. Kernels that overlap (a second one launched early to
    wait for the first) count in full; `SpanTimer` counts such time once.
    """

    @property
    def method(self) -> str:
        """See `Timer.method`."""
        return "cupti, sum of kernels" + self._after

    def samples(self, calls: Iterator[Call], wait: Wait, what: str) -> list[float]:
        """See `Timer.samples`."""
        try:
            # The one CUPTI client that a JAX installation is sure to have; its public form,
            # `mosaic.gpu.profiler.measure`, takes JAX functions only.
            cupti = importlib.import_module("jax._src.lib.mosaic_gpu")._mosaic_gpu_ext
        except ImportError as error:
            raise MeasurementError(
                f"CUPTI cannot be had on {jax.default_backend()=}: {error}; install jax[cuda13] on "
                "a machine with an NVIDIA GPU"
            ) from error
        cupti._cupti_init()
        try:
            self._call_all(calls, wait)
        finally:
            milliseconds = cupti._cupti_get_timings(True)
        kernels = [Kernel(str(name), 0.0, 1e3 * float(ms)) for name, ms in milliseconds]
        groups = per_call(kernels, self.calls, what)
        return [sum(kernel.end_us for kernel in group) for group in groups]


@dataclasses.dataclass(frozen=True)
class SpanTimer(Timer):
    """From the start of a call's first kernel to the end of its last, in a JAX profiler trace.

    Time between a call's kernels counts, and so do copies and memsets.
    """

    @property
    def method(self) -> str:
        """See `Timer.method`."""
        return "profiler trace, first start to last end" + self._after

    def samples(self, calls: Iterator[Call], wait: Wait, what: str) -> list[float]:
        """See `Timer.samples`."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        options.host_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            jax.profiler.start_trace(folder, profiler_options=options)
            try:
                self._call_all(calls, wait)
            finally:
                jax.profiler.stop_trace()
            files = list(Path(folder).rglob("*.xplane.pb"))
            if len(files) != 1:
                raise MeasurementError(f"{what}: {files=}: expected one trace from JAX's profiler")
            kernels = traced_kernels(jax.profiler.ProfileData.from_file(str(files[0])))
        groups = per_call(kernels, self.calls, what)
        return [
            max(kernel.end_us for kernel in group) - min(kernel.start_us for kernel in group)
            for group in groups
        ]


@dataclasses.dataclass(frozen=True)
class WallTimer(Timer):
    """The host's clock around a call and its wait: for machines without a GPU."""

    @property
    def method(self) -> str:
        """See `Timer.method`."""
        return "wall" + self._after

    def samples(self, calls: Iterator[Call], wait: Wait, what: str) -> list[float]:
        """See `Timer.samples`."""
        result = []
        for _ in range(self.calls):
            start = time.perf_counter()
            wait(next(calls)())
            result.append(1e6 * (time.perf_counter() - start))
        return result


TIMERS: dict[str, type[Timer]] = {"cupti": KernelSumTimer, "trace": SpanTimer, "wall": WallTimer}


def traced_kernels(trace: jax.profiler.ProfileData) -> list[Kernel]:
    """What ran on the GPUs' streams, in order of start."""
    return sorted(
        (
            Kernel(event.name, event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3)
            for plane in trace.planes
            if plane.name.startswith("/device:GPU:")
            for line in plane.lines
            # Other lines of the plane repeat the same time by module or operation.
            if line.name.startswith("Stream")
            for event in line.events
        ),
        key=lambda kernel: kernel.start_us,
    )


def per_call(kernels: Sequence[Kernel], calls: int, what: str) -> list[Sequence[Kernel]]:
    """The kernels of each of `calls` calls that followed one another.

    Raises:
        MeasurementError: no kernels, or not the same ones in each call.
    """
    if not kernels:
        raise MeasurementError(
            f"{what}: no kernel was seen in {calls} calls. The profiler does not see this "
            "library's work, or another profiler holds CUPTI; end that one, or take another --timer"
        )
    each, rest = divmod(len(kernels), calls)
    groups = [kernels[i * each : (i + 1) * each] for i in range(calls)]
    names = [sorted(kernel.name for kernel in group) for group in groups]
    if rest or any(other != names[0] for other in names):
        counts = {
            name: sum(kernel.name == name for kernel in kernels)
            for name in sorted(set(n for n, *_ in kernels))
        }
        raise MeasurementError(
            f"{what}: {len(kernels)} kernels in {calls} calls, not the same in each: {counts}"
        )
    return groups
