"""One decode step of an attention layer of random weights, over BF16, FP8 and FP4 caches.

The layer takes a token of each request from hidden states to hidden states: projections, the append
to a cache that is updated in place, attention to the whole context, the output's projection.
DeepSeek-R1 keeps latents (dense MLA), Qwen3-235B keys and values of 4 heads (GQA). Beside the step
stands its attention alone, and for GQA over BF16 that of cuDNN, whose keys and values are no pages
but one request after the other.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table

from benchmarks.attention_models import MODELS, Layer
from benchmarks.floors import Ceilings
from benchmarks.records import Environment, cell, to_json_line
from benchmarks.timing import MeasurementError, Timer
from jmla.attention import Implementation
from jmla.layouts.key_values import BF16KeyValues

DTYPES = ("bfloat16", "fp8_e4m3", "fp4_e2m1")
PEER = "cudnn, contiguous"


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a step.

    Attributes:
        model: a name of `MODELS`.
        b: requests, of one new token each.
        s_kv: tokens of a request with the new one.
    """

    model: str
    b: int
    s_kv: int

    @property
    def name(self) -> str:
        """The case on a command line."""
        return f"{self.model}-b{self.b}-s_kv{self.s_kv}"


CASES = tuple(
    Case(model, *sizes)
    for model in ("deepseek-r1", "qwen3-235b")
    for sizes in ((128, 4096), (16, 32768), (1, 131072))
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; None stands for what was not measured.

    Attributes:
        op: the op's name.
        case: `key=value` pairs: model cache b s_kv.
        implementation: of our ops.
        ours_us: our time of the whole step.
        attention_us: of its attention alone.
        peer: another library's attention.
        peer_us: its time.
        floor_us: of `bytes` at the rate of a large copy, for the attention.
        bytes_per_token: that the cache keeps of a token.
        bytes: of all that attention reads of the cache.
        gbps: of the attention.
        first_call_s: compilation and the first run.
        error: relative L2 error of the layer's output against the one over a BF16 cache.
        copy_gbps: rate of a large copy, bytes read and written.
        method: how times were taken.
        environment: where and when; its fields are keys of the line.
    """

    op: str
    case: str
    implementation: str
    ours_us: float
    attention_us: float
    peer: str | None
    peer_us: float | None
    floor_us: float
    bytes_per_token: int
    bytes: int
    gbps: float
    first_call_s: float
    error: float
    copy_gbps: float
    method: str
    environment: Environment

    def to_json(self) -> str:
        """One line, floats to five digits."""
        return to_json_line(self)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: how a call is timed.
        ceilings: rates of this GPU, from the same run.
        environment: where and when.
        implementation: of our ops; None takes the library's choice.
        with_peer: also measure cuDNN.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: Implementation | None = "mosaic_gpu"
    with_peer: bool = True

    def run(
        self,
        cases: Sequence[Case],
        dtypes: Sequence[str],
        *,
        failed: Callable[[str, Exception], None],
    ) -> Iterator[Record]:
        """A record for each case and cache.

        Args:
            cases: what to measure.
            dtypes: of `DTYPES`; errors are against "bfloat16" whether it is among them or not.
            failed: gets the name and the reason of each case that has no record.
        """
        for case in cases:
            layer = MODELS[case.model](case.b, case.s_kv, self.implementation)
            try:
                exact = self._output(layer, "bfloat16")
            # Whatever is wrong with one case must not cost the others their results.
            except Exception as error:
                failed(case.name, error)
                continue
            for dtype in dtypes:
                try:
                    yield self._measure(case, layer, dtype, exact)
                except Exception as error:
                    failed(f"{case.name} {dtype}", error)

    def _output(self, layer: Layer, dtype: str) -> np.ndarray:
        out, _ = jax.jit(layer.step, donate_argnums=0)(layer.cache(dtype), *layer.inputs())
        return np.asarray(out, np.float64)

    def _measure(self, case: Case, layer: Layer, dtype: str, exact: np.ndarray) -> Record:
        name = f"model={case.model} cache={dtype} b={case.b} s_kv={case.s_kv}"
        cache, inputs = layer.cache(dtype), layer.inputs()
        num_bytes = case.b * case.s_kv * layer.bytes_per_token(cache)
        attend_us = self._attention_us(layer, cache, name)
        peer_us = None
        if self.with_peer and isinstance(cache, BF16KeyValues):
            peer_us = self._peer_us(case, cache, layer, name)

        step = jax.jit(layer.step, donate_argnums=0)
        start = time.perf_counter()
        out, cache = jax.block_until_ready(step(cache, *inputs))
        first_call_s = time.perf_counter() - start
        error = float(np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact))
        if not np.isfinite(error):
            raise MeasurementError(f"{name}: {error=}: the results are not finite")
        held = [cache]

        def call() -> Array:
            # The cache is donated: each call has the one that the call before has left.
            result, held[0] = step(held[0], *inputs)
            return result

        us = self.timer.measure(itertools.repeat(call), jax.block_until_ready, what=name)
        return Record(
            op="attention_layer",
            case=name,
            implementation=self.implementation or "default",
            ours_us=us,
            attention_us=attend_us,
            peer=PEER if peer_us is not None else None,
            peer_us=peer_us,
            floor_us=num_bytes / self.ceilings.copy_gbps / 1e3,
            bytes_per_token=layer.bytes_per_token(cache),
            bytes=num_bytes,
            gbps=num_bytes / attend_us / 1e3,
            first_call_s=first_call_s,
            error=error,
            copy_gbps=self.ceilings.copy_gbps,
            method=self.timer.method,
            environment=self.environment,
        )

    def _attention_us(self, layer: Layer, cache: Any, name: str) -> float:
        call = functools.partial(jax.jit(layer.attend), cache, layer.queries())
        what = f"attention, {name}"
        return self.timer.measure(itertools.repeat(call), jax.block_until_ready, what=what)

    def _peer_us(self, case: Case, cache: BF16KeyValues, layer: Layer, name: str) -> float:
        """cuDNN over as many keys and values, in order."""
        shape = (case.b, case.s_kv, cache.kv_heads, cache.head_dim)

        def in_order(x: Array) -> Float[Array, "b s_kv kv_heads head_dim"]:
            return x.reshape(-1, *shape[2:])[: case.b * case.s_kv].reshape(shape)

        keys, values = in_order(cache.keys), in_order(cache.values)
        attend = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
        call = functools.partial(attend, layer.queries(), keys, values)
        what = f"{PEER}, {name}"
        return self.timer.measure(itertools.repeat(call), jax.block_until_ready, what=what)


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"{first.op}, {first.environment.gpu}, µs ({first.method})",
        caption=f"floor: what attention reads of the cache at the {first.copy_gbps:.0f} GB/s of a "
        f"copy; peer: {PEER}; error: of the layer's output against the one over BF16",
    )
    made.add_column("case", overflow="fold")
    for name in ("step", "attention", "peer", "floor", "GB/s", "bytes per token", "error"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            record.case,
            f"{record.ours_us:.1f}",
            f"{record.attention_us:.1f}",
            cell(record.peer_us, ".1f"),
            f"{record.floor_us:.1f}",
            f"{record.gbps:.0f}",
            str(record.bytes_per_token),
            f"{record.error:.2e}",
        )
    return made
