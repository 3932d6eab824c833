"""Sparse prefill over every cache layout, BF16 beside FlashMLA over the same rows."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int

import jmla
from benchmarks import accuracy
from benchmarks.floors import Ceilings, Gather, floor_us
from benchmarks.inputs import LAYOUTS, QUERY_STD, SM_SCALE, random_cache
from benchmarks.peers import FlashMLAPrefill
from benchmarks.records import Environment, Record
from benchmarks.timing import MeasurementError, Timer
from jmla.attention import Implementation
from jmla.layouts import BF16Rows, Rows

SHARED = 0.9  # of a query's clustered indices are those of the queries around it
GROUP = 64  # queries that share them
PAGE_SIZE = 64
CHECKED = 3  # query tokens whose results are compared with f64


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call, and how its indices are drawn.

    Attributes:
        n: query tokens.
        h: heads.
        s_kv: rows of the cache.
        topk: indices of a query token.
        clustered: whether queries that follow one another share most of their indices.
    """

    n: int
    h: int
    s_kv: int = 32768
    topk: int = 2048
    clustered: bool = False

    @property
    def name(self) -> str:
        """The case on a command line: what differs from the usual is named."""
        parts = [f"n{self.n}", f"h{self.h}"]
        parts += [f"s_kv{self.s_kv}"] if self.s_kv != 32768 else []
        parts += [f"topk{self.topk}"] if self.topk != 2048 else []
        return "-".join([*parts, *["clustered"] * self.clustered])

    @property
    def num_rows(self) -> int:
        """Cache rows that a call reads, each as often as it is named."""
        return self.n * self.topk

    def describe(self, layout: str) -> str:
        """The case in the results."""
        return f"layout={layout} n={self.n} h={self.h} s_kv={self.s_kv} topk={self.topk}"

    def flops(self, width: int, value_dim: int) -> int:
        """Of both products."""
        return 2 * self.num_rows * self.h * (width + value_dim)


CASES = (
    Case(4096, 128),
    Case(4096, 128, s_kv=8192),
    Case(4096, 128, s_kv=131072),
    Case(4096, 64),
    Case(4096, 128, clustered=True),
    Case(512, 128),
    Case(64, 128),
    Case(1, 128),
    Case(4096, 32),
    Case(4096, 16),
    Case(4096, 8),
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: how a call is timed, on all sides alike.
        ceilings: rates of this GPU, from the same run.
        environment: where and when.
        implementation: of our op; None takes the library's choice.
        with_peer: also measure FlashMLA.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: Implementation | None = "mosaic_gpu"
    with_peer: bool = True

    def run(
        self,
        cases: Sequence[Case],
        layouts: Sequence[str],
        *,
        failed: Callable[[str, Exception], None],
    ) -> Iterator[Record]:
        """A record for each case over each layout.

        Args:
            cases: what to measure.
            layouts: names of `LAYOUTS`.
            failed: gets the name and the reason of each case that has no record.
        """
        for layout, case in itertools.product(layouts, cases):
            try:
                yield self._measure(case, layout)
            # Whatever is wrong with one case must not cost the others their results.
            except Exception as error:
                failed(f"{case.name} {layout}", error)

    def _measure(self, case: Case, layout: str) -> Record:
        rows = random_cache(LAYOUTS[layout], slots=case.s_kv, page_size=PAGE_SIZE)
        name, num_bytes = case.describe(layout), case.num_rows * rows.bytes_per_token
        inputs = [_inputs(case, rows.width, seed) for seed in range(2)]
        q, indices = inputs[0]
        exact = _Exact.of(case, q, rows, indices)

        attend = jax.jit(
            functools.partial(
                jmla.sparse_prefill, sm_scale=SM_SCALE, implementation=self.implementation
            )
        )
        start = time.perf_counter()
        out, _, lse = jax.block_until_ready(attend(q, rows, indices))
        first_call_s = time.perf_counter() - start
        errors = exact.compare(np.asarray(out), np.asarray(lse), f"ours, {name}")
        del out, lse
        calls = [functools.partial(attend, q, rows, indices) for q, indices in inputs]
        ours_us = self.timer.measure(
            itertools.cycle(calls), jax.block_until_ready, what=f"ours, {name}"
        )

        peer_us: float | None = None
        peer_errors: accuracy.Errors | None = None
        has_peer = self.with_peer and isinstance(rows, BF16Rows)
        if has_peer:
            assert isinstance(rows, BF16Rows)
            peer, what = FlashMLAPrefill.over(rows.flat().latents, sm_scale=SM_SCALE), "flashmla, "
            peer_calls = [peer.call(*each) for each in inputs]
            peer_errors = exact.compare(*peer.results(peer_calls[0](), case.h), what + name)
            peer_us = self.timer.measure(itertools.cycle(peer_calls), peer.wait, what=what + name)

        flops = case.flops(rows.width, rows.value_dim)
        gather = Gather.for_rows(rows.num_slots, rows.bytes_per_token)
        gather_us = gather.measure(self.timer, [indices for _, indices in inputs])
        return Record(
            op="sparse_prefill",
            case=name,
            indices="clustered" if case.clustered else "uniform",
            scale_format=None,
            implementation=self.implementation or "default",
            ours_us=ours_us,
            peer=FlashMLAPrefill.name if has_peer else None,
            peer_us=peer_us,
            floor_us=floor_us(gather_us, flops, self.ceilings),
            bytes=num_bytes,
            unique_bytes=np.unique(np.asarray(indices)).size * rows.bytes_per_token,
            flops=flops,
            tflops=flops / ours_us / 1e6,
            gbps=num_bytes / ours_us / 1e3,
            first_call_s=first_call_s,
            error=errors.out,
            peer_error=peer_errors.out if peer_errors else None,
            lse_error=errors.lse,
            peer_lse_error=peer_errors.lse if peer_errors else None,
            gather_us=gather_us,
            gather_by=gather.by,
            matmul_tflops=self.ceilings.matmul_tflops,
            copy_gbps=self.ceilings.copy_gbps,
            method=self.timer.method,
            environment=self.environment,
        )


def _inputs(
    case: Case, width: int, seed: int
) -> tuple[BFloat16[Array, "n h width"], Int[Array, "n topk"]]:
    rng = np.random.default_rng(seed)
    shape = (case.n, case.topk)
    slots = rng.integers(0, case.s_kv, shape, dtype=np.int32)
    if case.clustered:
        groups = math.ceil(case.n / GROUP)
        common = rng.integers(0, case.s_kv, (groups, case.topk), dtype=np.int32)
        common = np.repeat(common, GROUP, axis=0)[: case.n]
        slots = np.where(rng.random(shape, np.float32) < SHARED, common, slots)
    make_q = jax.jit(
        lambda key: (QUERY_STD * jax.random.normal(key, (case.n, case.h, width))).astype(
            jnp.bfloat16
        )
    )
    return make_q(jax.random.key(seed)), jnp.asarray(slots)


@dataclasses.dataclass(frozen=True)
class _Exact:
    """The f64 results of some of a call's query tokens."""

    tokens: np.ndarray
    out: np.ndarray
    lse: np.ndarray

    @classmethod
    def of(cls, case: Case, q: Array, rows: Rows, indices: Array) -> "_Exact":
        tokens = accuracy.sample(case.n, CHECKED)
        keys = jmla.dequantize(rows.gather(indices[tokens]))
        out, lse = accuracy.attend(
            np.asarray(q[tokens]), np.asarray(keys), sm_scale=SM_SCALE, value_dim=rows.value_dim
        )
        return cls(tokens, out, lse)

    def compare(self, out: np.ndarray, lse: np.ndarray, what: str) -> accuracy.Errors:
        """The errors of a call's results, out [n, h, value] and lse [n, h]."""
        errors = accuracy.compare(out[self.tokens], lse[self.tokens], self.out, self.lse)
        if not math.isfinite(errors.out + errors.lse):
            raise MeasurementError(f"{what}: {errors=}: the results are not finite")
        return errors
