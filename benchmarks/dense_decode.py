"""Dense decode over the pages of whole contexts, BF16 beside FlashMLA over the same pages."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int

import jmla
from benchmarks import accuracy, attention
from benchmarks.floors import Ceilings, Gather
from benchmarks.inputs import LAYOUTS, QUERY_STD, SM_SCALE, random_cache
from benchmarks.peers import FlashMLADense
from benchmarks.records import Environment, Record
from benchmarks.timing import Timer
from jmla.attention import Implementation
from jmla.layouts import BF16Rows, Rows

PAGE_SIZE = 64  # the peer's


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call.

    Attributes:
        b: requests.
        h: heads.
        s_kv: positions of each request, or of the longest.
        s_q: tokens of each.
        uneven: whether lengths are anything from 1 to `s_kv`.
    """

    b: int
    h: int
    s_kv: int
    s_q: int = 1
    uneven: bool = False

    @property
    def name(self) -> str:
        """The case on a command line: what differs from the usual is named."""
        parts = [f"b{self.b}"]
        parts += [f"s_q{self.s_q}"] if self.s_q != 1 else []
        return "-".join([*parts, f"h{self.h}", f"s_kv{self.s_kv}", *["uneven"] * self.uneven])

    def describe(self, layout: str) -> str:
        """The case in the results."""
        return f"layout={layout} b={self.b} h={self.h} s_q={self.s_q} s_kv={self.s_kv}"

    def lengths(self) -> np.ndarray:
        """int32 [b]."""
        if not self.uneven:
            return np.full(self.b, self.s_kv, np.int32)
        return np.random.default_rng(0).integers(1, self.s_kv + 1, self.b, dtype=np.int32)


CASES = (
    Case(128, 128, 4096),
    Case(128, 128, 8192, s_q=2),
    Case(128, 64, 8192),
    Case(128, 16, 8192),
    Case(128, 16, 8192, s_q=2),
    Case(16, 128, 8192),
    Case(1, 128, 131072),
    Case(1, 16, 131072),
    Case(128, 128, 8192, uneven=True),
    Case(128, 16, 16384, uneven=True),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all cases share.

    Attributes:
        slots: rows of the cache, if no case needs more.
        rotated_bytes: cache rows that other calls read before a page table comes again: some
            times the GPU's L2 cache.
        checked: query tokens whose results are compared with f64.
    """

    slots: int = 1 << 20
    rotated_bytes: int = 1 << 28
    checked: int = 3


class _Inputs(NamedTuple):
    q: BFloat16[Array, "b s_q h width"]
    table: Int[Array, "b max_pages"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: how a call is timed, on all sides alike.
        ceilings: rates of this GPU, from the same run.
        environment: where and when.
        implementation: of our op; None takes the library's choice.
        with_peer: also measure FlashMLA.
        sizes: see there.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: Implementation | None = "mosaic_gpu"
    with_peer: bool = True
    sizes: Sizes = Sizes()

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
        slots = max(self.sizes.slots, *(case.b * case.s_kv for case in cases))
        for layout in layouts:
            rows = random_cache(LAYOUTS[layout], slots=slots, page_size=PAGE_SIZE)
            for case in cases:
                try:
                    yield self._measure(case, layout, rows)
                # Whatever is wrong with one case must not cost the others their results.
                except Exception as error:
                    failed(f"{case.name} {layout}", error)

    def _measure(self, case: Case, layout: str, rows: Rows) -> Record:
        name, lengths = case.describe(layout), case.lengths()
        num_rows = int(lengths.sum())
        num_bytes = num_rows * rows.bytes_per_token
        count = max(2, 1 + math.ceil(self.sizes.rotated_bytes / num_bytes))
        inputs = [_inputs(case, rows, seed) for seed in range(count)]
        read = [_slots(np.asarray(each.table), lengths) for each in inputs]
        exact = self._exact(case, inputs[0], rows, lengths)
        attend = jax.jit(
            functools.partial(
                jmla.dense_decode, sm_scale=SM_SCALE, implementation=self.implementation
            )
        )
        seq_lens = jnp.asarray(lengths)
        arguments = [(each.q, rows, each.table, seq_lens) for each in inputs]
        ours = attention.measure(attend, arguments, exact, self.timer, what=f"ours, {name}")
        theirs = None
        if self.with_peer and isinstance(rows, BF16Rows):
            theirs = FlashMLADense.name, self._measure_peer(case, rows, inputs, seq_lens, exact)
        gather = Gather.for_rows(rows.num_slots, rows.bytes_per_token)
        return attention.record(
            op="dense_decode",
            case=name,
            kind="uneven" if case.uneven else "even",
            scale_format=None,
            implementation=self.implementation,
            rows=rows,
            indices=jnp.asarray(read[0]),
            # A causal token sees up to s_q - 1 positions less, which is not counted.
            flops=2 * num_rows * case.s_q * case.h * (rows.width + rows.value_dim),
            ours=ours,
            peer=theirs,
            gather=gather,
            gather_us=gather.measure(self.timer, [jnp.asarray(each) for each in read]),
            timer=self.timer,
            ceilings=self.ceilings,
            environment=self.environment,
        )

    def _exact(
        self, case: Case, inputs: _Inputs, rows: Rows, lengths: np.ndarray
    ) -> attention.Exact:
        tokens = accuracy.sample(case.b * case.s_q, self.sizes.checked)
        table, parts = np.asarray(inputs.table), []
        for i, j in zip(*divmod(tokens, case.s_q), strict=True):
            slots = _slots(table[i : i + 1], lengths[i : i + 1] - (case.s_q - 1 - j))
            keys = np.asarray(jmla.dequantize(rows.flat().gather(jnp.asarray(slots))))
            parts.append(
                accuracy.attend(
                    np.asarray(inputs.q[i, j])[None],
                    keys[None],
                    sm_scale=SM_SCALE,
                    value_dim=rows.value_dim,
                )
            )
        out, lse = (np.concatenate(each) for each in zip(*parts, strict=True))
        return attention.Exact(tokens, out, lse)

    def _measure_peer(
        self,
        case: Case,
        rows: BF16Rows,
        inputs: Sequence[_Inputs],
        seq_lens: Int[Array, " b"],
        exact: attention.Exact,
    ) -> attention.Measured:
        peer = FlashMLADense.over(rows.latents, sm_scale=SM_SCALE)
        what, metadata = f"{peer.name}, {case.name}", peer.metadata()
        calls = [peer.call(each.q, each.table, seq_lens, metadata) for each in inputs]
        errors = exact.compare(*peer.results(calls[0]()), what)
        us = self.timer.measure(itertools.cycle(calls), peer.wait, what=what)
        return attention.Measured(us, errors)


def _slots(table: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The slots of all positions of all requests, one request after the other."""
    return np.concatenate(
        [
            row[np.arange(length) // PAGE_SIZE] * PAGE_SIZE + np.arange(length) % PAGE_SIZE
            for row, length in zip(table, lengths, strict=True)
        ]
    ).astype(np.int32)


def _inputs(case: Case, rows: Rows, seed: int) -> _Inputs:
    """Pages in a random order, each of one request."""
    max_pages = math.ceil(case.s_kv / PAGE_SIZE)
    order = np.random.default_rng(seed).permutation(rows.shape[0])[: case.b * max_pages]
    shape = (case.b, case.s_q, case.h, rows.width)
    q = QUERY_STD * jax.random.normal(jax.random.key(seed), shape)
    return _Inputs(q.astype(jnp.bfloat16), jnp.asarray(order.reshape(case.b, max_pages), jnp.int32))
