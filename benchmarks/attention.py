"""What the benchmarks of attention share: exact results, a timed call, the record of a case."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Array, BFloat16, Int

import jmla
from benchmarks import accuracy
from benchmarks.floors import Ceilings, Gather, floor_us
from benchmarks.inputs import SM_SCALE
from benchmarks.records import Environment, Record
from benchmarks.timing import MeasurementError, Timer
from jmla.layouts import Rows


@dataclasses.dataclass(frozen=True)
class Exact:
    """The f64 results of some of a call's query tokens.

    Attributes:
        tokens: their numbers.
        out: f64 [tokens, h, value].
        lse: f64 [tokens, h].
    """

    tokens: np.ndarray
    out: np.ndarray
    lse: np.ndarray

    @classmethod
    def of(
        cls,
        q: BFloat16[Array, "n h width"],
        rows: Rows,
        indices: Int[Array, "n topk"],
        *,
        count: int,
    ) -> Self:
        """At most `count` of the `n` tokens' results."""
        tokens = accuracy.sample(q.shape[0], count)
        keys = jmla.dequantize(rows.gather(indices[tokens]))
        out, lse = accuracy.attend(
            np.asarray(q[tokens]), np.asarray(keys), sm_scale=SM_SCALE, value_dim=rows.value_dim
        )
        return cls(tokens, out, lse)

    def compare(self, out: np.ndarray, lse: np.ndarray, what: str) -> accuracy.Errors:
        """The errors of a call's results, out [*tokens, h, value] and lse [*tokens, h].

        Raises:
            MeasurementError: a result is not finite.
        """
        errors = accuracy.compare(
            out.reshape(-1, *out.shape[-2:])[self.tokens],
            lse.reshape(-1, lse.shape[-1])[self.tokens],
            self.out,
            self.lse,
        )
        if not math.isfinite(errors.out + errors.lse):
            raise MeasurementError(f"{what}: {errors=}: the results are not finite")
        return errors


@dataclasses.dataclass(frozen=True)
class Measured:
    """One side of a case.

    Attributes:
        us: the time of a call.
        errors: of the results.
        first_call_s: compilation and the first run; of ours alone.
    """

    us: float
    errors: accuracy.Errors
    first_call_s: float = math.nan


def measure(
    attend: Callable[..., tuple[Any, ...]],
    arguments: Sequence[tuple[Any, ...]],
    exact: Exact,
    timer: Timer,
    *,
    what: str,
) -> Measured:
    """Calls an op, compares what it gives with f64, and times it.

    Args:
        attend: gives out first and lse last.
        arguments: of the calls, which take turns; `exact` belongs to the first.
        exact: see there.
        timer: see there.
        what: is measured, for messages.
    """
    start = time.perf_counter()
    results = jax.block_until_ready(attend(*arguments[0]))
    first_call_s = time.perf_counter() - start
    errors = exact.compare(np.asarray(results[0]), np.asarray(results[-1]), what)
    del results
    calls = [functools.partial(attend, *each) for each in arguments]
    us = timer.measure(itertools.cycle(calls), jax.block_until_ready, what=what)
    return Measured(us, errors, first_call_s)


def record(
    *,
    op: str,
    case: str,
    kind: str,
    scale_format: str | None,
    implementation: str | None,
    rows: Rows,
    indices: Int[Array, "*tokens topk"],
    flops: int,
    ours: Measured,
    peer: tuple[str, Measured] | None,
    gather: Gather,
    gather_us: float,
    timer: Timer,
    ceilings: Ceilings,
    environment: Environment,
) -> Record:
    """The record of a case.

    Args:
        op: its name.
        case: its sizes.
        kind: how the slots were drawn.
        scale_format: of a block-scale cache.
        implementation: of our op; None is its own choice.
        rows: the cache.
        indices: the slots of one call.
        flops: of both products.
        ours: our side.
        peer: the other library's name and side.
        gather: what reads the same rows.
        gather_us: its time.
        timer: of all times.
        ceilings: of this GPU.
        environment: where and when.
    """
    num_bytes = indices.size * rows.bytes_per_token
    name, theirs = peer or (None, None)
    return Record(
        op=op,
        case=case,
        indices=kind,
        scale_format=scale_format,
        implementation=implementation or "default",
        ours_us=ours.us,
        peer=name,
        peer_us=theirs.us if theirs else None,
        floor_us=floor_us(gather_us, flops, ceilings),
        bytes=num_bytes,
        unique_bytes=np.unique(np.asarray(indices)).size * rows.bytes_per_token,
        flops=flops,
        tflops=flops / ours.us / 1e6,
        gbps=num_bytes / ours.us / 1e3,
        first_call_s=ours.first_call_s,
        error=ours.errors.out,
        peer_error=theirs.errors.out if theirs else None,
        lse_error=ours.errors.lse,
        peer_lse_error=theirs.errors.lse if theirs else None,
        gather_us=gather_us,
        gather_by=gather.by,
        matmul_tflops=ceilings.matmul_tflops,
        copy_gbps=ceilings.copy_gbps,
        method=timer.method,
        environment=environment,
    )
