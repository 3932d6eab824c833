"""Writing, reading and converting cache rows, beside a device copy of as many bytes."""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from benchmarks import cache_peer
from benchmarks.cache_work import MANY, Case, Work, prepare
from benchmarks.floors import Ceilings, Gather
from benchmarks.records import Environment
from benchmarks.timing import Timer, WallTimer

__all__ = ["CASES", "MANY", "Bench", "Case", "Record", "prepare", "table"]

CHOSEN = 1 << 16
PROMPT = 100_000
_LAYOUTS = ("656", "576", "fp4", "584")
_FP32 = (("scale_format", "fp32"),)
_SCALED = (("scale", 0.25),)
CASES = (
    Case("requantize", "576", MANY),
    Case("convert", "656", MANY),
    Case("convert", "656", MANY, _SCALED),
    *(Case("quantize", layout, MANY) for layout in _LAYOUTS),
    Case("quantize", "656", MANY, _FP32),
    Case("quantize", "576", MANY, _SCALED),
    *(Case("dequantize", layout, MANY) for layout in _LAYOUTS),
    *(Case("gather", layout, CHOSEN) for layout in (*_LAYOUTS, "bf16")),
    *(Case("pages", layout, CHOSEN) for layout in _LAYOUTS),
    *(Case(op, "656", CHOSEN) for op in ("move", "move_within", "move_out", "move_in")),
    *(Case("append_raw", "656", n) for n in (1, 64, 256, 4096)),
    Case("append_raw", "656", PROMPT, prompt=True),
    *(Case("append", layout, n) for layout in (*_LAYOUTS, "bf16") for n in (1, 16, 64, 256)),
    Case("append", "656", 4096),
    Case("append", "656", PROMPT),
    *(Case("append", layout, PROMPT, prompt=True) for layout in (*_LAYOUTS, "bf16")),
    *(Case("append_packed", layout, n) for layout in ("656", "584") for n in (64, 4096)),
    *(Case("append_packed", layout, PROMPT, prompt=True) for layout in ("656", "584")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; see `benchmarks.records.Record` for what is not told here.

    Attributes:
        xla_us: time of the same op by XLA, or None if it was not asked for.
        bytes: read and written.
        gbps: our rate of them.
        of_copy: that rate as a part of a copy's.
        floor_us: of a copy of as many bytes; for gather, of reading the rows at random and of
            writing the result at the rate of a copy; for move_out and move_in, of a transfer of as
            many bytes by `jax.device_put`, by the host's clock.
        peer: its name, or None if there is none.
        peer_us: its time.
        peer_error: the part of its bytes that are not ours, or None.
    """

    op: str
    case: str
    implementation: str
    ours_us: float
    peer: str | None
    peer_us: float | None
    peer_error: float | None
    xla_us: float | None
    floor_us: float
    bytes: int
    gbps: float
    of_copy: float
    first_call_s: float
    copy_gbps: float
    method: str
    environment: Environment

    def to_json(self) -> str:
        """One line, floats to five digits, with the keys that all benchmarks have."""
        fields = dataclasses.asdict(self)
        fields |= fields.pop("environment")
        # Results are the same bytes as the reference's, as the tests see.
        fields |= {"flops": 0, "error": 0.0}
        return json.dumps(
            {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in fields.items()}
        )


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: takes the times.
        ceilings: of this GPU.
        environment: of the records.
        implementation: of our op.
        with_peer: also time the peer, where there is one.
        with_xla: also time the op by XLA.
        scale: all cases have so many times fewer tokens, for tests.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: str
    with_peer: bool = False
    with_xla: bool = False
    scale: int = 1

    def run(
        self, cases: Sequence[Case], failed: Callable[[str, Exception], None]
    ) -> Iterator[Record]:
        """A record for each case that can be measured; `failed` hears of the others."""
        for case in cases:
            try:
                yield self.measure(case)
            except Exception as error:  # one case's failure is not the others'
                failed(f"{case.op} {case.name}", error)

    def measure(self, case: Case) -> Record:
        """One case."""
        # Moving bytes heats the chip little, and some microseconds of it not at all.
        cooldown_s = 0.1 if case.n > 4096 else 0.02
        timer = dataclasses.replace(self.timer, cooldown_s=min(cooldown_s, self.timer.cooldown_s))
        work = prepare(case, self.implementation, self.scale)
        start = time.perf_counter()
        result = jax.block_until_ready(next(work.calls)())
        first_call_s = time.perf_counter() - start
        ours_us = timer.measure(work.calls, jax.block_until_ready, what=case.name)
        xla_us = None
        if self.with_xla:
            calls = prepare(case, "xla", self.scale).calls
            xla_us = timer.measure(calls, jax.block_until_ready, what=case.name)
        peer_us = peer_error = None
        peer = cache_peer.prepare(case) if self.with_peer else None
        if peer is not None:
            peer_error = peer.error(result)
            peer_us = timer.measure(peer.calls, peer.wait, what=case.name)
        gbps = work.bytes / ours_us / 1e3
        return Record(
            op=case.op,
            case=case.name,
            implementation=self.implementation,
            ours_us=ours_us,
            peer=None if peer is None else peer.name,
            peer_us=peer_us,
            peer_error=peer_error,
            xla_us=xla_us,
            floor_us=self._floor_us(case, work),
            bytes=work.bytes,
            gbps=gbps,
            of_copy=gbps / self.ceilings.copy_gbps,
            first_call_s=first_call_s,
            copy_gbps=self.ceilings.copy_gbps,
            method=self.timer.method,
            environment=self.environment,
        )

    def _floor_us(self, case: Case, work: Work) -> float:
        if work.link:
            return self._link_us(work.link, work.bytes)
        if not work.slots:
            return work.bytes / self.ceilings.copy_gbps / 1e3
        row_bytes = case.kv_layout.bytes_per_token()
        reading = Gather.for_rows(MANY // self.scale, row_bytes).measure(self.timer, work.slots)
        written = work.bytes - work.slots[0].size * row_bytes
        return reading + written / self.ceilings.copy_gbps / 1e3

    def _link_us(self, way: str, size: int) -> float:
        """Of JAX's own transfer of one array."""
        kinds = ("device", "pinned_host") if way == "out" else ("pinned_host", "device")
        device = jax.devices()[0]
        source, target = (SingleDeviceSharding(device, memory_kind=kind) for kind in kinds)
        array = jax.device_put(jnp.zeros(size, jnp.uint8), source)
        move = functools.partial(jax.device_put, array, target)
        # Transfers are no kernels, for which CUPTI's sum has nothing; these take a millisecond.
        return WallTimer(warmup=2, calls=8).measure(
            itertools.repeat(move), jax.block_until_ready, what=f"move {way}"
        )


def _names(records: Sequence[Record]) -> str:
    return "; ".join(sorted({record.peer for record in records if record.peer})) or "none"


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"cache, {first.environment.gpu}, µs ({first.method})",
        caption=f"copy {first.copy_gbps:.0f} GB/s; peers: {_names(records)}",
    )
    made.add_column("case", overflow="fold")
    made.add_column("peer's name")
    for name in ("ours", "peer", "xla", "floor", "GB/s", "of a copy", "first call s"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            f"{record.op} {record.case}",
            (record.peer or "-").split(",")[0],
            f"{record.ours_us:.1f}",
            *("-" if us is None else f"{us:.1f}" for us in (record.peer_us, record.xla_us)),
            f"{record.floor_us:.1f}",
            f"{record.gbps:.0f}",
            f"{record.of_copy:.0%}",
            f"{record.first_call_s:.1f}",
        )
    return made
