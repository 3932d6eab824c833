"""The indexer's logits, alone and with the selection behind them, beside DeepGEMM's."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.table import Table

import jmla
from benchmarks.deep_gemm import DeepGEMM
from benchmarks.floors import Ceilings
from benchmarks.records import Environment, cell, to_json_line
from benchmarks.timing import MeasurementError, Timer
from jmla.layouts import IndexKeyRows, PagedIndexKeyRows, paged_index_keys

Form = Literal["pages", "leaves", "ragged"]
Operands = tuple[Any, ...]
"""What the op takes: queries, weights, keys, then windows or pages and lengths."""

DIM, PAGE = 128, 64
POOL_BYTES = 1 << 29  # of keys that calls choose pages from: some times the GPU's L2 cache
_PEER_TOPK = 2048  # the only one that SGLang's selection has
_LARGEST_ERROR = 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call.

    Attributes:
        b: requests, or tokens of a prompt whose windows end with themselves.
        s_kv: keys of a request, or of the buffer.
        form: pages of 8448 bytes, which the peer reads; the leaves of `IndexKeyRows`; or one
            buffer of those.
        topk: how many are selected; 0 for logits alone.
        s_q: queries of a request.
        heads: of a query.
    """

    b: int
    s_kv: int
    form: Form = "pages"
    topk: int = 0
    s_q: int = 1
    heads: int = 64

    @property
    def name(self) -> str:
        """The case on a command line: what differs from the usual is named."""
        parts = [f"n{self.b}" if self.form == "ragged" else f"b{self.b}", f"s_kv{self.s_kv}"]
        parts += [f"s_q{self.s_q}"] if self.s_q > 1 else []
        parts += [f"h{self.heads}"] if self.heads != 64 else []
        parts += [self.form] if self.form == "leaves" else []
        parts += [f"topk{self.topk}"] if self.topk else []
        return "-".join(parts)

    @property
    def has_peer(self) -> bool:
        """Whether DeepGEMM, on Hopper, computes the same."""
        return self.form != "leaves" and self.s_q == 1 and self.topk in (0, _PEER_TOPK)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        if self.form == "ragged":
            return self.b * self.s_kv - self.b * (self.b - 1) // 2
        return self.b * self.s_q * self.s_kv

    @property
    def num_bytes(self) -> int:
        """Of the keys, once, and of the logits, once; or of the selection instead of those."""
        keys = self.s_kv * (1 if self.form == "ragged" else self.b)
        results = self.b * self.s_q * self.topk if self.topk else self.pairs
        return keys * (DIM + 4) + 4 * results

    @property
    def flops(self) -> int:
        """Of the products."""
        return 2 * self.pairs * self.heads * DIM


CASES = (
    Case(1, 32768),
    Case(64, 32768),
    Case(128, 32768),
    Case(1, 131072),
    Case(64, 131072),
    Case(64, 32768, "leaves"),
    Case(64, 131072, "leaves"),
    Case(64, 32768, s_q=2),
    Case(64, 32768, heads=32),
    Case(64, 32768, topk=2048),
    Case(128, 32768, topk=2048),
    Case(64, 131072, topk=2048),
    Case(4096, 32768, "ragged"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; None stands for what was not measured.

    Attributes:
        op: the op's name.
        case: `key=value` pairs: b topk s_kv s_q h.
        form: of the keys, see `Case`.
        implementation: of our ops.
        ours_us: our time.
        peer: the other library.
        peer_us: its time; its plan, made once for all layers, is not in it.
        floor_us: of `bytes` at the rate of a large copy, or of `flops` at twice the rate of a bf16
            product.
        bytes: of keys and results.
        flops: of the products.
        gbps: our rate, of `bytes`.
        tflops: our rate, of `flops`.
        first_call_s: compilation and the first run.
        error: relative L2 error of our logits against exact products; the share of positions
            that exact logits would not have chosen, where there is a selection.
        peer_error: the peer's; None for a selection.
        copy_gbps: rate of a large copy, bytes read and written.
        matmul_tflops: rate of a large bf16 matrix product.
        method: how times were taken.
        environment: where and when; its fields are keys of the line.
    """

    op: str
    case: str
    form: str
    implementation: str
    ours_us: float
    peer: str | None
    peer_us: float | None
    floor_us: float
    bytes: int
    flops: int
    gbps: float
    tflops: float
    first_call_s: float
    error: float
    peer_error: float | None
    copy_gbps: float
    matmul_tflops: float
    method: str
    environment: Environment

    def to_json(self) -> str:
        """One line, floats to five digits."""
        return to_json_line(self)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: how a call is timed, on both sides alike.
        ceilings: rates of this GPU, from the same run.
        environment: where and when.
        implementation: of our ops; None takes the library's choice.
        with_peer: also measure DeepGEMM.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: str | None = None
    with_peer: bool = True

    def run(
        self, cases: Sequence[Case], *, failed: Callable[[str, Exception], None]
    ) -> Iterator[Record]:
        """A record for each case; `failed` gets the name and the reason of one that has none."""
        for case in cases:
            try:
                yield self._measure(case)
            # Whatever is wrong with one case must not cost the others their results.
            except Exception as error:
                failed(case.name, error)

    def _measure(self, case: Case) -> Record:
        sets = draw(case)
        ours = jax.jit(functools.partial(_run, case, self.implementation))
        start = time.perf_counter()
        got = np.asarray(jax.block_until_ready(ours(*sets[0])))
        first_call_s = time.perf_counter() - start
        exact = _exact(case, sets[0])
        error = _error(case, got, exact, sets[0])
        if not error < _LARGEST_ERROR:
            raise MeasurementError(f"{case.name}: {error=}: expected less than {_LARGEST_ERROR}")
        ours_us = self.timer.measure(
            itertools.cycle([functools.partial(ours, *each) for each in sets]),
            jax.block_until_ready,
            what=f"ours, {case.name}",
        )
        peer_us: float | None = None
        peer_error: float | None = None
        if self.with_peer and case.has_peer:
            peer = DeepGEMM.load()
            if not case.topk or peer.selects:
                calls = [_peer_call(peer, case, each) for each in sets]
                found = peer.results(calls[0]())
                peer_error = None if case.topk else _error(case, found, exact, sets[0])
                peer_us = self.timer.measure(
                    itertools.cycle(calls), peer.wait, what=f"{peer.name}, {case.name}"
                )
        by_bytes = case.num_bytes / self.ceilings.copy_gbps / 1e3
        by_flops = case.flops / (2 * self.ceilings.matmul_tflops) / 1e6
        return Record(
            op="indexer_logits",
            case=f"b={case.b} s_kv={case.s_kv} s_q={case.s_q} h={case.heads} topk={case.topk}",
            form=case.form,
            implementation=self.implementation or "default",
            ours_us=ours_us,
            peer=DeepGEMM.name if peer_us else None,
            peer_us=peer_us,
            floor_us=max(by_bytes, by_flops),
            bytes=case.num_bytes,
            flops=case.flops,
            gbps=case.num_bytes / ours_us / 1e3,
            tflops=case.flops / ours_us / 1e6,
            first_call_s=first_call_s,
            error=error,
            peer_error=peer_error,
            copy_gbps=self.ceilings.copy_gbps,
            matmul_tflops=self.ceilings.matmul_tflops,
            method=self.timer.method,
            environment=self.environment,
        )


def _run(case: Case, implementation: str | None, *operands: Any) -> Array:
    if case.form == "ragged":
        return jmla.indexer_logits(*operands, implementation=implementation)
    if not case.topk:
        return jmla.paged_indexer_logits(*operands, implementation=implementation)
    q, weights, keys, page_table, lengths = operands
    slots = jmla.paged_indexer_topk(
        q, weights, keys, page_table, lengths, case.topk, slots=True, implementation=implementation
    )
    return slots.reshape(-1, case.topk)


def draw(case: Case) -> list[Operands]:
    """Inputs of calls that follow one another: of different pages, until all have been read."""
    keys, q_key, w_key = jax.random.split(jax.random.key(0), 3)
    shape = (case.b, case.heads) if case.form == "ragged" else (case.b, case.s_q, case.heads)
    # The size of values that a quantiser leaves: the largest of 128 becomes 448.
    q = _codes(q_key, math.prod(shape)).reshape(*shape, DIM)
    weights = jax.random.normal(w_key, shape, jnp.float32)
    if case.form == "ragged":
        rows = _rows(keys, case.s_kv)
        starts = jnp.zeros(case.b, jnp.int32)
        ends = jnp.arange(case.s_kv - case.b, case.s_kv, dtype=jnp.int32) + 1
        return [(q, weights, rows, starts, ends)]
    own = case.b * case.s_kv // PAGE
    pages = max(own, POOL_BYTES // (PAGE * (DIM + 4)))
    leaves = _rows(keys, pages * PAGE).reshape(pages, PAGE)
    stored: IndexKeyRows | PagedIndexKeyRows = leaves
    if case.form == "pages":
        packed = jax.block_until_ready(jax.jit(lambda rows: rows.pack())(leaves))
        stored = paged_index_keys(packed, page_size=PAGE, dim=DIM)
    lengths = jnp.full((case.b, case.s_q), case.s_kv, jnp.int32)
    rng = np.random.default_rng(0)
    sets = []
    for _ in range(min(8, 1 + (pages - 1) // own)):
        table = jnp.asarray(rng.permutation(pages)[:own].reshape(case.b, -1), jnp.int32)
        sets.append((q, weights, stored, table, lengths))
    return sets


@functools.partial(jax.jit, static_argnums=1)
def _codes(key: Array, count: int) -> Array:
    """e4m3 [count, 128]."""
    step = min(count, 1 << 16)

    def some(key: Array) -> Array:
        return (160 * jax.random.normal(key, (step, DIM), jnp.bfloat16)).astype(jnp.float8_e4m3fn)

    parts = jax.lax.map(some, jax.random.split(key, -(-count // step)))
    return parts.reshape(-1, DIM)[:count]


def _rows(key: Array, count: int) -> IndexKeyRows:
    scales = jnp.exp(jax.random.normal(key, (count,), jnp.float32) / 4) / 448
    return IndexKeyRows(_codes(key, count), scales)


def _exact(case: Case, operands: Operands) -> np.ndarray:
    """Logits of the first request, or of some tokens, by products that are exact."""
    if case.form == "ragged":
        q, weights, rows, starts, ends = operands
        some = _some(case)
        exact = jmla.indexer_logits(
            q[some], weights[some], rows, starts[some], ends[some], implementation="xla"
        )
        return np.asarray(exact)
    q, weights, rows, table, lengths = operands
    exact = jmla.paged_indexer_logits(
        q[:1], weights[:1], rows, table[:1], lengths[:1], implementation="xla"
    )
    return np.asarray(exact)[0]


def _some(case: Case) -> np.ndarray:
    return np.linspace(0, case.b - 1, 4).astype(np.int32)


def _error(case: Case, got: np.ndarray, exact: np.ndarray, operands: Operands) -> float:
    if case.topk:
        table = np.asarray(operands[3][0])
        best = np.argsort(-exact[0], kind="stable")[: case.topk]
        slots = table[best // PAGE] * PAGE + best % PAGE
        return 1 - float(np.isin(got[0], slots).mean())
    ours = got[_some(case)] if case.form == "ragged" else got.reshape(case.b, case.s_q, -1)[0]
    seen = np.isfinite(exact)
    # Outside of its windows the peer leaves what was there.
    difference = np.where(seen, ours, 0) - np.where(seen, exact, 0)
    return float(np.linalg.norm(difference) / np.linalg.norm(exact[seen]))


def _peer_call(peer: DeepGEMM, case: Case, operands: Operands) -> Callable[[], Any]:
    if case.form == "ragged":
        q, weights, rows, starts, ends = operands
        return peer.ragged_call(q, weights, rows.keys, rows.scales, starts, ends)
    q, weights, stored, table, lengths = operands
    if case.topk:
        return peer.selecting_call(q, weights, stored.packed, table, lengths, k=case.topk)
    return peer.paged_call(q, weights, stored.packed, table, lengths)


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"{first.op}, {first.environment.gpu}, µs ({first.method})",
        caption=(
            f"floor: keys and results at the {first.copy_gbps:.0f} GB/s of a copy, or products at "
            f"twice the {first.matmul_tflops:.0f} TFLOPS of bf16"
        ),
    )
    made.add_column("case", overflow="fold")
    columns = ("ours", "deep_gemm", "speedup", "floor", "GB/s", "TFLOPS", "error", "its error")
    for name in (*columns, "first call s"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            f"{record.case} {record.form}",
            f"{record.ours_us:.1f}",
            cell(record.peer_us, ".1f"),
            cell(record.peer_us and record.peer_us / record.ours_us, ".2f"),
            f"{record.floor_us:.1f}",
            f"{record.gbps:.0f}",
            f"{record.tflops:.0f}",
            f"{record.error:.1e}",
            cell(record.peer_error, ".1e"),
            f"{record.first_call_s:.1f}",
        )
    return made
