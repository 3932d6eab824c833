"""Top-k selection beside SGLang's fast_topk over the same scores."""

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table

import jmla
from benchmarks.floors import Ceilings
from benchmarks.modules import required
from benchmarks.records import Environment, cell, to_json_line
from benchmarks.timing import Call, MeasurementError, Timer

Kind = Literal["normal", "equal", "few", "ascending", "last_bits"]

_LIBRARY = "SGLANG_OPS"
_INSTALL = (
    f"put PyTorch on the PYTHONPATH and the path of sglang-kernel's sm90/common_ops.abi3.so in "
    f"{_LIBRARY}, or pass --no-peer"
)
_PEER_TOPK = 2048  # the only one that it has


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call, and what the scores are like."""

    b: int
    s_kv: int
    topk: int = 2048
    kind: Kind = "normal"

    @property
    def name(self) -> str:
        """The case on a command line: what differs from the usual is named."""
        parts = [f"b{self.b}", f"s_kv{self.s_kv}"]
        parts += [f"topk{self.topk}"] if self.topk != 2048 else []
        parts += [self.kind] if self.kind != "normal" else []
        return "-".join(parts)

    @property
    def num_bytes(self) -> int:
        """Of the scores and of the positions."""
        return 4 * self.b * (self.s_kv + self.topk)


CASES = (
    Case(1, 32768),
    Case(64, 32768),
    Case(128, 32768),
    Case(1, 131072),
    Case(64, 131072),
    Case(1024, 131072),
    Case(4096, 8192),
    Case(64, 131072, topk=512),
    *(Case(64, 131072, kind=kind) for kind in get_args(Kind)[1:]),
    *(Case(64, 32768, kind=kind) for kind in get_args(Kind)[1:]),
    *(Case(4096, 8192, kind=kind) for kind in get_args(Kind)[1:]),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; None stands for what was not measured.

    Attributes:
        op: the op's name.
        case: `key=value` pairs: b topk s_kv.
        scores: how they were drawn.
        implementation: of our op.
        ours_us: our time.
        peer: the other library.
        peer_us: its time.
        floor_us: of `bytes` at the rate of a large copy.
        bytes: of scores and positions.
        flops: none.
        gbps: our rate, of `bytes`.
        first_call_s: the first run, and compilation for the first case of its sizes.
        error: rows of those compared with a stable sort in which ours differ: 0.
        peer_error: share of the peer's positions there that are not among the largest.
        copy_gbps: rate of a large copy, bytes read and written.
        method: how times were taken.
        environment: where and when; its fields are keys of the line.
    """

    op: str
    case: str
    scores: str
    implementation: str
    ours_us: float
    peer: str | None
    peer_us: float | None
    floor_us: float
    bytes: int
    flops: int
    gbps: float
    first_call_s: float
    error: float
    peer_error: float | None
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
        timer: how a call is timed, on both sides alike.
        ceilings: rates of this GPU, from the same run.
        environment: where and when.
        implementation: of our op; None takes the library's choice.
        with_peer: also measure fast_topk.
        rotated_bytes: of scores that other calls read before the same come again: some times the
            GPU's L2 cache.
        checked: rows whose results are compared with a sort.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: str | None = None
    with_peer: bool = True
    rotated_bytes: int = 1 << 28
    checked: int = 4

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
        sets = 1 + math.ceil(self.rotated_bytes / (4 * case.b * case.s_kv))
        scores = [draw(case, seed) for seed in range(min(sets, 64))]
        lengths = jnp.full(case.b, case.s_kv, jnp.int32)
        select = _compiled(case.topk, self.implementation)
        start = time.perf_counter()
        positions = np.asarray(jax.block_until_ready(select(scores[0], lengths)))
        first_call_s = time.perf_counter() - start
        rows = range(0, case.b, max(1, case.b // self.checked))
        wanted = {row: _sorted(np.asarray(scores[0][row]), case.topk) for row in rows}
        wrong = sum(not np.array_equal(positions[row], wanted[row]) for row in rows)
        if wrong:
            raise MeasurementError(f"{case.name}: {wrong} of {len(rows)} rows are wrong")
        calls = [functools.partial(select, each, lengths) for each in scores]
        ours_us = self.timer.measure(
            itertools.cycle(calls), jax.block_until_ready, what=f"ours, {case.name}"
        )
        peer_us: float | None = None
        peer_error: float | None = None
        if self.with_peer and case.topk == _PEER_TOPK:
            peer = FastTopk.load()
            peer_calls = [peer.call(each, lengths) for each in scores]
            found = peer.results(peer_calls[0]())
            missed = [_share_missed(found[row], np.asarray(scores[0][row])) for row in rows]
            peer_error = float(np.mean(missed))
            peer_us = self.timer.measure(
                itertools.cycle(peer_calls), peer.wait, what=f"{peer.name}, {case.name}"
            )
        return Record(
            op="select_topk",
            case=f"b={case.b} topk={case.topk} s_kv={case.s_kv}",
            scores=case.kind,
            implementation=self.implementation or "default",
            ours_us=ours_us,
            peer=FastTopk.name if peer_us else None,
            peer_us=peer_us,
            floor_us=case.num_bytes / self.ceilings.copy_gbps / 1e3,
            bytes=case.num_bytes,
            flops=0,
            gbps=case.num_bytes / ours_us / 1e3,
            first_call_s=first_call_s,
            error=0.0,
            peer_error=peer_error,
            copy_gbps=self.ceilings.copy_gbps,
            method=self.timer.method,
            environment=self.environment,
        )


@functools.cache
def _compiled(k: int, implementation: str | None) -> Callable[..., Array]:
    """The op; cases that differ in their scores alone share what was compiled."""
    return jax.jit(functools.partial(jmla.select_topk, k=k, implementation=implementation))


@functools.partial(jax.jit, static_argnums=0)
def _drawn(case: Case, key: Array) -> Float[Array, "b s_kv"]:
    scores = jax.random.normal(key, (case.b, case.s_kv), jnp.float32)
    match case.kind:
        case "equal":
            return jnp.full_like(scores, 1.5)
        case "few":
            return jnp.round(scores)
        case "ascending":
            return jnp.sort(scores, axis=1)
        case "last_bits":
            bits = 0x3F800000 + jax.random.randint(key, scores.shape, 0, 4)
            return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return scores


def draw(case: Case, seed: int) -> Float[Array, "b s_kv"]:
    """Scores of a case; adversarial ones are the same each time."""
    return _drawn(case, jax.random.key(seed))


def _sorted(scores: np.ndarray, k: int) -> np.ndarray:
    chosen = np.argsort(-scores, kind="stable")[:k]
    return np.sort(chosen)


def _share_missed(positions: np.ndarray, row: np.ndarray) -> float:
    """The share of the largest scores, equal ones counted alike, that a selection lacks."""
    kept = np.unique(positions[(positions >= 0) & (positions < row.size)])
    bound = np.sort(row)[-positions.size]
    above = np.flatnonzero(row > bound)
    hits = np.isin(above, kept).sum() + min(
        positions.size - above.size, int((row[kept] == bound).sum())
    )
    return 1 - hits / positions.size


@dataclasses.dataclass(frozen=True)
class FastTopk:
    """SGLang's kernel.

    Attributes:
        torch: the module.
    """

    torch: Any

    name = "fast_topk"

    @classmethod
    def load(cls) -> "FastTopk":
        """The kernel from its library.

        Raises:
            ModuleNotFoundError: PyTorch or the library is not there.
        """
        torch = required("torch", install=_INSTALL)
        path = Path(os.environ.get(_LIBRARY, ""))
        if not path.is_file():
            raise ModuleNotFoundError(f"{_LIBRARY}={str(path)!r} is no file: {_INSTALL}")
        torch.ops.load_library(str(path))
        return cls(torch)

    def call(self, scores: Float[Array, "b s_kv"], lengths: Array) -> Call:
        """A call on these inputs, which returns its positions."""
        scores, lengths = jax.block_until_ready((scores, lengths))
        given, ends = self.torch.from_dlpack(scores), self.torch.from_dlpack(lengths)
        out = self.torch.empty(
            scores.shape[0], _PEER_TOPK, dtype=self.torch.int32, device=given.device
        )

        def run() -> Any:
            self.torch.ops.sgl_kernel.fast_topk(given, out, ends, None)
            return out

        return run

    def results(self, returned: Any) -> np.ndarray:
        """The positions that a call returned."""
        return returned.cpu().numpy()

    def wait(self, _: object) -> None:
        """Until all its work is done."""
        self.torch.cuda.synchronize()


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"{first.op}, {first.environment.gpu}, µs ({first.method})",
        caption=f"floor: scores and positions at the {first.copy_gbps:.0f} GB/s of a copy",
    )
    made.add_column("case", overflow="fold")
    for name in ("ours", "fast_topk", "speedup", "floor", "GB/s", "it misses", "first call s"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            " ".join(w for w in (record.case, record.scores) if w != "normal"),
            f"{record.ours_us:.1f}",
            cell(record.peer_us, ".1f"),
            cell(record.peer_us and record.peer_us / record.ours_us, ".2f"),
            f"{record.floor_us:.1f}",
            f"{record.gbps:.0f}",
            cell(record.peer_error, ".1e"),
            f"{record.first_call_s:.1f}",
        )
    return made
