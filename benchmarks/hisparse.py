"""A layer's host-resident cache: swaps, new tokens and admissions beside the host link's rate."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.table import Table

from benchmarks.floors import Ceilings
from benchmarks.host_link import Link, measure_link
from benchmarks.inputs import LAYOUTS
from benchmarks.records import Environment, to_json_line
from benchmarks.timing import Call, Timer
from jmla.cache import init_cache
from jmla.hisparse import (
    HiSparsePool,
    HiSparseSizes,
    HiSparseState,
    Swap,
    admit,
    append,
    assign_pages,
    init_state,
    plan_swap,
    replay,
    swap_in,
)
from jmla.hisparse.placement import place_prompt

PAGE = 64
LINK_BYTES = 1 << 29  # of a bulk copy
ROUNDS = 64  # selections that follow one another: more than a timer's calls


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: swap_in, fetch (its rows alone, as a layer that reuses a selection does), append (a
            token of each request), or admit (one request, of `context` tokens).
        layout: as results name it.
        b: requests.
        context: tokens of each.
        fresh: of the positions of a swap, the share that is drawn anew, from the whole context,
            since the swap before; the others stay.
        topk: positions of a request.
        buffer: slots of a request.
        layers: of as many layers' rows one after the other, a fetch reads those of one.
    """

    op: str
    layout: str = "656"
    b: int = 16
    context: int = 65536
    fresh: float = 0.0
    topk: int = 2048
    buffer: int = 4096
    layers: int = 1

    @property
    def name(self) -> str:
        """As the results have it."""
        words = [f"layout={self.layout}", f"b={self.b}", f"context={self.context}"]
        if self.op in ("swap_in", "fetch"):
            words += [f"fresh={self.fresh:g}", f"topk={self.topk}", f"buffer={self.buffer}"]
        if self.op == "fetch":
            words.append(f"layers={self.layers}")
        return " ".join(words)


CASES = (
    *(Case("swap_in", b=b) for b in (1, 16, 64)),
    *(Case("swap_in", fresh=fresh) for fresh in (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)),
    *(Case("swap_in", layout, fresh=0.2) for layout in ("bf16", "576", "fp4", "584")),
    Case("swap_in", b=1, fresh=0.1),
    *(Case("fetch", fresh=fresh) for fresh in (0.02, 0.05, 0.1, 0.2, 1.0)),
    *(Case("fetch", fresh=0.1, layers=layers) for layers in (2, 4, 8, 16)),
    Case("append"),
    *(Case("admit", layout, b=1) for layout in ("656", "bf16")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; see `benchmarks.records.Record` for what is not told here.

    Attributes:
        misses: rows that a call fetches, the mean of the timed calls' selections.
        floor_us: of the bytes that cross the link, at its rate.
        bytes: that cross the link.
        gbps: our rate of them.
        link_gbps: the link's, in that direction: the faster of a copy engine and of a kernel that
            reads a pinned array from its start to its end.
        of_link: the one as a part of the other.
    """

    op: str
    case: str
    implementation: str
    ours_us: float
    peer: str | None = None
    peer_us: float | None = None
    misses: float
    floor_us: float
    bytes: int
    flops: int = 0
    gbps: float
    link_gbps: float
    of_link: float
    first_call_s: float
    error: float = 0.0
    peer_error: float | None = None
    method: str
    environment: Environment

    def to_json(self) -> str:
        """One line, floats to five digits."""
        return to_json_line(self)


class Work(NamedTuple):
    """What a case does.

    Attributes:
        calls: endless; each starts the op.
        bytes: of one call that cross the link.
        misses: rows of one call that are fetched.
        to_host: which way they go.
    """

    calls: Iterator[Call]
    bytes: int
    misses: float = 0.0
    to_host: bool = False


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: takes the times.
        ceilings: of this GPU.
        environment: of the records.
        implementation: of our op.
        scale: tokens, slots and positions are so many times fewer, for tests.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: str
    scale: int = 1

    def run(
        self, cases: Sequence[Case], failed: Callable[[str, Exception], None]
    ) -> Iterator[Record]:
        """A record for each case that can be measured; `failed` hears of the others."""
        link = measure_link(self.timer, LINK_BYTES // self.scale)
        for case in cases:
            try:
                yield self.measure(case, link)
            except Exception as error:  # one case's failure is not the others'
                failed(f"{case.op} {case.name}", error)

    def measure(self, case: Case, link: Link) -> Record:
        """One case."""
        work = prepare(case, self.implementation, self.scale)
        start = time.perf_counter()
        jax.block_until_ready(next(work.calls)())
        first_call_s = time.perf_counter() - start
        ours_us = self.timer.measure(work.calls, jax.block_until_ready, what=case.name)
        link_gbps = link.to_host if work.to_host else link.to_device
        gbps = work.bytes / ours_us / 1e3
        return Record(
            op=case.op,
            case=case.name,
            implementation=self.implementation,
            ours_us=ours_us,
            misses=work.misses,
            floor_us=work.bytes / link_gbps / 1e3,
            bytes=work.bytes,
            gbps=gbps,
            link_gbps=link_gbps,
            of_link=gbps / link_gbps,
            first_call_s=first_call_s,
            method=self.timer.method,
            environment=self.environment,
        )


def prepare(case: Case, implementation: str, scale: int = 1) -> Work:
    """The inputs of a case, and its calls."""
    context, topk = max(case.context // scale, PAGE), max(case.topk // scale, 4)
    how: Any = {"implementation": implementation}
    state = filled_state(case, context, max(case.buffer // scale, topk), case.op == "append")
    row_bytes = state.buffer_rows.bytes_per_token
    lens = jnp.full(case.b, context, jnp.int32)
    held = [state]
    if case.op == "admit":
        return _admit(case, context, held, row_bytes, how)
    if case.op == "append":
        write = jax.jit(functools.partial(append, **how), donate_argnums=0)
        new = jax.random.normal(
            jax.random.key(0), (case.b, 1, state.buffer_rows.width), jnp.bfloat16
        )
        keys = jax.random.normal(jax.random.key(1), (case.b, 1, 128), jnp.bfloat16)

        def store() -> object:
            held[0] = write(held[0], lens, new, keys)
            return held[0]

        return Work(itertools.repeat(store), case.b * row_bytes, to_host=True)

    plan = jax.jit(functools.partial(plan_swap, **how))
    swap = jax.jit(functools.partial(swap_in, **how), donate_argnums=0)
    choices = [jnp.asarray(each) for each in drifting(case, context, topk)]
    # The first fills the buffers, and is not among the timed ones; nor does any of them come again.
    held[0], _ = swap(held[0], choices[0], lens)
    residency, swaps = held[0].residency, []
    for choice in choices[1:]:
        residency, asked = plan(residency, choice, lens)
        swaps.append(asked)
    misses = float(np.mean([int(jnp.sum(asked.sources >= 0)) for asked in swaps]))
    num_bytes = round(misses * row_bytes)
    if case.op == "fetch":
        return Work(_fetches(case, context, held, swaps, how), num_bytes, misses)

    def call(choice: Array) -> object:
        held[0], slots = swap(held[0], choice, lens)
        return slots

    calls = itertools.cycle([functools.partial(call, choice) for choice in choices[1:]])
    return Work(calls, num_bytes, misses)


def _fetches(
    case: Case, context: int, held: list[HiSparseState], swaps: Sequence[Swap], how: Any
) -> Iterator[Call]:
    """Endless: the rows of each swap in turn, of each layer in turn."""
    buffer = held[0].sizes.device_buffer_size
    held += [filled_state(case, context, buffer, keyed=False) for _ in range(1, case.layers)]
    fetch = jax.jit(functools.partial(replay, **how), donate_argnums=0)
    # Of each layer alike; donated with one of them, they would be gone for the others.
    residency = jax.tree.map(jnp.copy, held[0].residency)

    def call(layer: int, swap: Swap) -> object:
        held[layer] = fetch(held[layer], residency, swap)
        return held[layer].buffer_rows

    turns = zip(itertools.cycle(range(case.layers)), itertools.cycle(swaps))
    return (functools.partial(call, *turn) for turn in turns)


def drifting(case: Case, context: int, topk: int) -> list[np.ndarray]:
    """Selections that follow one another, ascending as `select_topk` gives them."""
    rng = np.random.default_rng(0)
    now = np.stack([rng.permutation(context)[:topk] for _ in range(case.b)])
    fresh = round(case.fresh * topk)
    found = [np.sort(now, axis=1).astype(np.int32)]
    for _ in range(ROUNDS):
        now = now.copy()
        for row in now:
            row[rng.permutation(topk)[:fresh]] = rng.integers(0, context, fresh)
        found.append(np.sort(now, axis=1).astype(np.int32))
    return found


def filled_state(case: Case, context: int, buffer: int, keyed: bool) -> HiSparseState:
    """A state whose requests are all long, with their first tokens in their buffers."""
    pages = -(-context // PAGE)
    sizes = HiSparseSizes(
        requests=case.b,
        max_length=context,
        page_size=PAGE,
        num_pages=case.b * pages,
        num_buffer_pages=case.b * -(-(buffer + 1) // PAGE),
        device_buffer_size=buffer,
    )
    pool = HiSparsePool.empty(sizes)
    state = init_state(LAYOUTS[case.layout], sizes, index_dim=128 if keyed else None)
    residency = state.residency
    for request in range(case.b):
        pool = pool.reserve(request, context)
        residency = place_prompt(residency, jnp.int32(request), jnp.int32(context))
    state = dataclasses.replace(state, residency=residency)
    return assign_pages(state, jnp.asarray(pool.page_table), jnp.asarray(pool.buffer_table))


def _admit(case: Case, context: int, held: list[HiSparseState], row_bytes: int, how: Any) -> Work:
    pages = -(-context // PAGE)
    cache = init_cache(LAYOUTS[case.layout], num_pages=pages, page_size=PAGE)
    table = jax.random.permutation(jax.random.key(0), pages).astype(jnp.int32)
    move = jax.jit(functools.partial(admit, **how), donate_argnums=0)

    def call() -> object:
        held[0] = move(held[0], jnp.int32(0), jnp.int32(context), cache, table)
        return held[0]

    return Work(itertools.repeat(call), context * row_bytes, to_host=True)


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(title=f"host-resident caches, {first.environment.gpu}, µs ({first.method})")
    made.add_column("case", overflow="fold")
    for name in ("ours", "misses", "floor", "GB/s", "link", "of the link", "first call s"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            f"{record.op} {record.case}",
            f"{record.ours_us:.1f}",
            f"{record.misses:.0f}",
            f"{record.floor_us:.1f}",
            f"{record.gbps:.1f}",
            f"{record.link_gbps:.1f}",
            f"{record.of_link:.0%}",
            f"{record.first_call_s:.1f}",
        )
    return made
