"""Sparse prefill over every cache layout, BF16 beside FlashMLA over the same rows."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int

import jmla
from benchmarks import attention
from benchmarks.floors import Ceilings, Gather
from benchmarks.inputs import LAYOUTS, QUERY_STD, SM_SCALE, random_cache
from benchmarks.peers import FlashMLAPrefill
from benchmarks.records import Environment, Record
from benchmarks.timing import Timer
from jmla.attention import Implementation
from jmla.layouts import BF16Rows

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
        name = case.describe(layout)
        inputs = [_inputs(case, rows.width, seed) for seed in range(2)]
        q, indices = inputs[0]
        exact = attention.Exact.of(q, rows, indices, count=CHECKED)
        attend = jax.jit(
            functools.partial(
                jmla.sparse_prefill, sm_scale=SM_SCALE, implementation=self.implementation
            )
        )
        ours = attention.measure(
            attend,
            [(q, rows, slots) for q, slots in inputs],
            exact,
            self.timer,
            what=f"ours, {name}",
        )
        peer = None
        if self.with_peer and isinstance(rows, BF16Rows):
            peer = FlashMLAPrefill.name, self._measure_peer(rows, inputs, exact, case, name)
        gather = Gather.for_rows(rows.num_slots, rows.bytes_per_token)
        return attention.record(
            op="sparse_prefill",
            case=name,
            kind="clustered" if case.clustered else "uniform",
            scale_format=None,
            implementation=self.implementation,
            rows=rows,
            indices=indices,
            flops=case.flops(rows.width, rows.value_dim),
            ours=ours,
            peer=peer,
            gather=gather,
            gather_us=gather.measure(self.timer, [slots for _, slots in inputs]),
            timer=self.timer,
            ceilings=self.ceilings,
            environment=self.environment,
        )

    def _measure_peer(
        self,
        rows: BF16Rows,
        inputs: Sequence[tuple[Array, Array]],
        exact: attention.Exact,
        case: Case,
        name: str,
    ) -> attention.Measured:
        peer = FlashMLAPrefill.over(rows.flat().latents, sm_scale=SM_SCALE)
        what = f"{peer.name}, {name}"
        calls = [peer.call(*each) for each in inputs]
        errors = exact.compare(*peer.results(calls[0](), case.h), what)
        return attention.Measured(
            self.timer.measure(itertools.cycle(calls), peer.wait, what=what), errors
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
