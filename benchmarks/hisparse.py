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
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from benchmarks.floors import Ceilings
from benchmarks.inputs import LAYOUTS
from benchmarks.records import Environment, to_json_line
from benchmarks.timing import Call, Timer
from jmla.cache import init_cache
from jmla.hisparse import (
    HiSparsePool,
    HiSparseSizes,
    HiSparseState,
    admit,
    append,
    assign_pages,
    init_state,
    plan_swap,
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
        op: swap_in, append (a token of each request), or admit (one request, of `context` tokens).
        layout: as results name it.
        b: requests.
        context: tokens of each.
        fresh: of the positions of a swap, the share that is drawn anew, from the whole context,
            since the swap before; the others stay.
        topk: positions of a request.
        buffer: slots of a request.
    """

    op: str
    layout: str = "656"
    b: int = 16
    context: int = 65536
    fresh: float = 0.0
    topk: int = 2048
    buffer: int = 4096

    @property
    def name(self) -> str:
        """As the results have it."""
        words = [f"layout={self.layout}", f"b={self.b}", f"context={self.context}"]
        if self.op == "swap_in":
            words += [f"fresh={self.fresh:g}", f"topk={self.topk}", f"buffer={self.buffer}"]
        return " ".join(words)


CASES = (
    *(Case("swap_in", b=b) for b in (1, 16, 64)),
    *(Case("swap_in", fresh=fresh) for fresh in (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)),
    *(Case("swap_in", layout, fresh=0.2) for layout in ("bf16", "576", "fp4", "584")),
    Case("swap_in", b=1, fresh=0.1),
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


class Link(NamedTuple):
    """GB/s to and from host memory."""

    to_device: float
    to_host: float


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


def measure_link(timer: Timer, size: int) -> Link:
    """The rates of copies of `size` bytes between pinned and device memory, both ways."""
    device = jax.devices()[0]
    here = jax.device_put(jnp.zeros(size, jnp.uint8), SingleDeviceSharding(device))
    there = jax.device_put(here, SingleDeviceSharding(device, memory_kind="pinned_host"))

    def seconds(call: Call) -> float:
        # A copy engine's work is no kernel, so this is the host's clock.
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        return min(times)

    copies = [
        seconds(functools.partial(jax.device_put, source, like.sharding))
        for source, like in ((there, here), (here, there))
    ]
    rates = [size / s / 1e9 for s in copies]
    if device.platform == "gpu":
        rates[0] = max(rates[0], _bulk_read(timer, there))
    return Link(*rates)


def _bulk_read(timer: Timer, there: Array) -> float:
    from pallas_kernels.hot_buffer import copy_rows

    row = 4096
    rows = there.size // row
    order = jnp.arange(rows, dtype=jnp.int32)
    buffer = [jnp.zeros((rows, row), jnp.uint8)]
    read = jax.jit(
        lambda there, buffer: copy_rows(
            {"rows": there}, {"rows": buffer}, order, order, num_sources=rows, num_targets=rows
        )["rows"],
        donate_argnums=1,
    )

    def call() -> object:
        buffer[0] = read(there, buffer[0])
        return buffer[0]

    us = timer.measure(itertools.repeat(call), jax.block_until_ready, what="bulk read")
    return there.size / us / 1e3


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

    swap = jax.jit(functools.partial(swap_in, **how), donate_argnums=0)

    @jax.jit
    def count(*given: Any) -> tuple[Any, Array]:
        residency, asked = plan_swap(*given, **how)
        return residency, jnp.sum(asked.sources >= 0)

    choices = [jnp.asarray(each) for each in drifting(case, context, topk)]
    # The first fills the buffers, and is not among the timed ones; nor does any of them come again.
    held[0], _ = swap(held[0], choices[0], lens)
    residency, seen = held[0].residency, []
    for choice in choices[1:]:
        residency, missed = count(residency, choice, lens)
        seen.append(missed)
    misses = float(np.mean([int(missed) for missed in seen]))

    def call(choice: Array) -> object:
        held[0], slots = swap(held[0], choice, lens)
        return slots

    calls = itertools.cycle([functools.partial(call, choice) for choice in choices[1:]])
    return Work(calls, round(misses * row_bytes), misses)


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
