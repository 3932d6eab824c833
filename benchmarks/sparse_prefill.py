"""Sparse prefill over every cache layout, BF16 and 656 beside FlashMLA over the same rows.

The other layouts are read in two ways: the rows in place ("direct"), or copies of them in bf16 that
the call makes first ("gather"). FlashMLA has both for 656, too: its decode kernel, a request for
each query, and its prefill kernel over copies, which cost it what they cost us.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int

import jmla
from benchmarks import attention
from benchmarks.floors import Ceilings, Gather
from benchmarks.inputs import LAYOUTS, QUERY_STD, SM_SCALE, random_cache
from benchmarks.peers import FlashMLA, FlashMLAPrefill
from benchmarks.records import Environment, Record
from benchmarks.timing import Timer
from jmla._prefill_rows import gathered_rows
from jmla.attention import Implementation
from jmla.batch import BatchMeta, make_batch
from jmla.layouts import BF16Rows, BlockScaleRows, to_bytes

Way = Literal["direct", "gather"]
"""What the attention reads: the rows in place, or copies in bf16."""

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
        ways: Sequence[Way] = ("direct",),
        *,
        failed: Callable[[str, Exception], None],
    ) -> Iterator[Record]:
        """A record for each case over each layout, read in each way.

        Args:
            cases: what to measure.
            layouts: names of `LAYOUTS`.
            ways: that are measured; there is nothing to copy of bf16.
            failed: gets the name and the reason of each case that has no record.
        """
        for layout, case, way in itertools.product(layouts, cases, ways):
            if layout == "bf16" and way != ways[0]:
                continue
            try:
                yield self._measure(case, layout, "direct" if layout == "bf16" else way)
            # Whatever is wrong with one case must not cost the others their results.
            except Exception as error:
                failed(f"{case.name} {layout} {way}", error)

    def _measure(self, case: Case, layout: str, way: Way) -> Record:
        rows = random_cache(LAYOUTS[layout], slots=case.s_kv, page_size=PAGE_SIZE)
        name = case.describe(layout)
        inputs = [_inputs(case, rows.width, seed) for seed in range(2)]
        q, indices = inputs[0]
        exact = attention.Exact.of(q, rows, indices, count=CHECKED)
        batch = _one_request(case)

        @jax.jit
        def attend(q, rows, slots):
            if way == "gather":
                rows = gathered_rows(rows, batch)
            return jmla.sparse_prefill(
                q, rows, slots, sm_scale=SM_SCALE, implementation=self.implementation
            )

        ours = attention.measure(
            attend,
            [(q, rows, slots) for q, slots in inputs],
            exact,
            self.timer,
            what=f"ours, {way}, {name}",
        )
        peer = None
        if self.with_peer and isinstance(rows, BF16Rows | BlockScaleRows):
            peer = FlashMLA.name, self._measure_peer(rows, inputs, exact, case, batch, way)
        # What this GPU can do at best.
        at_rest = dataclasses.replace(self.timer, heat_s=0.0)
        gather = Gather.for_rows(rows.num_slots, rows.bytes_per_token)
        return attention.record(
            op="sparse_prefill",
            case=name,
            kind="clustered" if case.clustered else "uniform",
            scale_format=None,
            implementation=f"{self.implementation or 'default'}, {way}",
            rows=rows,
            indices=indices,
            flops=case.flops(rows.width, rows.value_dim),
            ours=ours,
            peer=peer,
            gather=gather,
            gather_us=gather.measure(at_rest, [slots for _, slots in inputs]),
            timer=self.timer,
            ceilings=self.ceilings,
            environment=self.environment,
        )

    def _measure_peer(
        self,
        rows: BF16Rows | BlockScaleRows,
        inputs: Sequence[tuple[Array, Array]],
        exact: attention.Exact,
        case: Case,
        batch: BatchMeta,
        way: Way,
    ) -> attention.Measured:
        what = f"FlashMLA, {way}, {case.name}"
        copies_us = 0.0
        if isinstance(rows, BlockScaleRows) and way == "direct":
            decode = FlashMLA.over(to_bytes(rows), sm_scale=SM_SCALE)
            metadata = decode.metadata()
            calls = [decode.call(q[:, None], slots[:, None], metadata) for q, slots in inputs]
            out, lse = decode.results(calls[0](), case.h)
            wait: Any = decode.wait
        else:
            copies = rows
            if isinstance(copies, BlockScaleRows):
                copy = functools.partial(jax.jit(gathered_rows), rows, batch)
                wait = jax.block_until_ready
                copies_us = self.timer.measure(itertools.repeat(copy), wait, what="copies")
                copies = copy()
            prefill = FlashMLAPrefill.over(copies.flat().latents, sm_scale=SM_SCALE)
            calls = [prefill.call(*each) for each in inputs]
            out, lse = prefill.results(calls[0](), case.h)
            wait = prefill.wait
        errors = exact.compare(out, lse, what)
        us = self.timer.measure(itertools.cycle(calls), wait, what=what)
        return attention.Measured(us + copies_us, errors)


def _one_request(case: Case) -> BatchMeta:
    """All rows of the cache in their order, so that a copy lies where its row does."""
    lens = (jnp.array([case.s_kv], jnp.int32), jnp.array([case.n], jnp.int32))
    table = jnp.arange(-(-case.s_kv // PAGE_SIZE), dtype=jnp.int32)[None]
    return make_batch(*lens, table, num_tokens=case.n, page_size=PAGE_SIZE)


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
