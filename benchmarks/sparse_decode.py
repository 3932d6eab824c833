"""Sparse decode over every cache layout, beside FlashMLA over the same bytes."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax

import jmla
from benchmarks import attention
from benchmarks.floors import Ceilings, Gather
from benchmarks.inputs import (
    IN_PLACE,
    LAYOUTS,
    SM_SCALE,
    IndexKind,
    Inputs,
    packed_in_place,
    random_cache,
    random_inputs,
)
from benchmarks.peers import FlashMLA
from benchmarks.records import Environment, Record
from benchmarks.timing import Timer
from jmla.attention import Implementation
from jmla.layouts import Rows, ScaleFormat


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call, and how its indices are drawn."""

    b: int
    h: int
    s_q: int = 1
    topk: int = 2048
    indices: IndexKind = "uniform"

    @property
    def name(self) -> str:
        """The case on a command line: what differs from the usual is named."""
        parts = [f"b{self.b}"]
        parts += [f"s_q{self.s_q}"] if self.s_q != 1 else []
        parts += [f"h{self.h}"]
        parts += [f"topk{self.topk}"] if self.topk != 2048 else []
        parts += [self.indices] if self.indices != "uniform" else []
        return "-".join(parts)

    @property
    def num_rows(self) -> int:
        """Cache rows that a call reads, each as often as it is named."""
        return self.b * self.s_q * self.topk

    def describe(self, layout: str) -> str:
        """The case in the results."""
        return f"layout={layout} b={self.b} h={self.h} s_q={self.s_q} topk={self.topk}"

    def flops(self, width: int, value_dim: int) -> int:
        """Of both products."""
        return 2 * self.num_rows * self.h * (width + value_dim)


CASES = (
    Case(128, 128),
    Case(64, 128),
    Case(128, 128, s_q=2),
    Case(128, 64),
    Case(128, 32),
    Case(128, 16),
    Case(128, 8),
    Case(1, 128),
    Case(2, 128, s_q=2),
    Case(16, 128),
    Case(148, 128, s_q=2, topk=16384),
    Case(128, 128, indices="clustered"),
    Case(128, 16, indices="clustered"),
)


@dataclasses.dataclass(frozen=True)
class Cache:
    """A layout to measure; `scale_format` is None where the layout has but one."""

    layout: str
    scale_format: ScaleFormat | None

    @property
    def has_peer(self) -> bool:
        """FlashMLA is run over the block-scale layout alone."""
        return self.stored_as == "656"

    @property
    def stored_as(self) -> str:
        """The name of the layout, however its bytes lie."""
        return IN_PLACE.get(self.layout, self.layout)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all cases share.

    Attributes:
        slots: rows of the cache: many times what any cache of the GPU holds.
        page_size: the peer's.
        rotated_bytes: cache rows that other calls read before a set of indices comes again: some
            times the GPU's L2 cache.
        checked: query tokens whose results are compared with f64.
    """

    slots: int = 1 << 20
    page_size: int = 64
    rotated_bytes: int = 1 << 28
    checked: int = 4


def caches(layouts: Sequence[str], scale_formats: Sequence[ScaleFormat]) -> list[Cache]:
    """The layouts, the block-scale one once per scale format."""
    return [
        Cache(layout, scale_format)
        for layout in layouts
        for scale_format in (scale_formats if Cache(layout, None).has_peer else (None,))
    ]


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
        measured: Sequence[Cache],
        *,
        failed: Callable[[str, Exception], None],
    ) -> Iterator[Record]:
        """A record for each case over each cache.

        Args:
            cases: what to measure.
            measured: over which caches.
            failed: gets the name and the reason of each case that has no record.
        """
        # Cases that differ in heads or scales alone read the same rows.
        gathers: dict[tuple, float] = {}
        for cache in measured:
            rows = random_cache(
                LAYOUTS[cache.stored_as],
                slots=self.sizes.slots,
                page_size=self.sizes.page_size,
                scale_format=cache.scale_format or "pow2",
            )
            peer = None
            if self.with_peer and cache.has_peer:
                peer = FlashMLA.over(jmla.to_bytes(rows), sm_scale=SM_SCALE)
            if cache.layout in IN_PLACE:
                rows = packed_in_place(rows, cache.scale_format)
            for case in cases:
                try:
                    yield self._measure(case, cache, rows, peer, gathers)
                # Whatever is wrong with one case must not cost the others their results.
                except Exception as error:
                    words = (case.name, cache.layout, cache.scale_format)
                    failed(" ".join(word for word in words if word), error)

    def _measure(
        self,
        case: Case,
        cache: Cache,
        rows: Rows,
        peer: FlashMLA | None,
        gathers: dict[tuple, float],
    ) -> Record:
        num_bytes = case.num_rows * rows.bytes_per_token
        inputs = random_inputs(
            max(2, 1 + math.ceil(self.sizes.rotated_bytes / num_bytes)),
            batch=case.b,
            s_q=case.s_q,
            heads=case.h,
            width=rows.width,
            topk=case.topk,
            slots=rows.num_slots,
            kind=case.indices,
        )
        name, first = case.describe(cache.layout), inputs[0]
        tokens = case.b * case.s_q
        exact = attention.Exact.of(
            first.q.reshape(tokens, *first.q.shape[2:]),
            rows,
            first.indices.reshape(tokens, case.topk),
            count=self.sizes.checked,
        )
        attend = jax.jit(
            functools.partial(
                jmla.sparse_decode, sm_scale=SM_SCALE, implementation=self.implementation
            )
        )
        arguments = [(each.q, rows, each.indices) for each in inputs]
        ours = attention.measure(attend, arguments, exact, self.timer, what=f"ours, {name}")
        theirs = None
        if peer is not None:
            theirs = peer.name, self._measure_peer(peer, inputs, exact, case, name)

        gather = Gather.for_rows(rows.num_slots, rows.bytes_per_token)
        key = (gather, dataclasses.replace(case, h=0))
        if key not in gathers:
            gathers[key] = gather.measure(self.timer, [each.indices for each in inputs])
        return attention.record(
            op="sparse_decode",
            case=name,
            kind=case.indices,
            scale_format=cache.scale_format,
            implementation=self.implementation,
            rows=rows,
            indices=first.indices,
            flops=case.flops(rows.width, rows.value_dim),
            ours=ours,
            peer=theirs,
            gather=gather,
            gather_us=gathers[key],
            timer=self.timer,
            ceilings=self.ceilings,
            environment=self.environment,
        )

    def _measure_peer(
        self,
        peer: FlashMLA,
        inputs: Sequence[Inputs],
        exact: attention.Exact,
        case: Case,
        name: str,
    ) -> attention.Measured:
        what = f"{peer.name}, {name}"
        metadata = peer.metadata()
        calls = [peer.call(each.q, each.indices, metadata) for each in inputs]
        errors = exact.compare(*peer.results(calls[0](), case.h), what)
        us = self.timer.measure(itertools.cycle(calls), peer.wait, what=what)
        return attention.Measured(us, errors)
