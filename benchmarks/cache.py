"""Writing, reading and converting cache rows, beside a device copy of as many bytes."""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.table import Table

from benchmarks.floors import Ceilings, Gather
from benchmarks.inputs import LAYOUTS
from benchmarks.records import Environment
from benchmarks.timing import Call, Timer
from jmla.cache import append, init_cache
from jmla.layouts import KVLayout, Rows, convert, dequantize, quantize

MANY = 1 << 20
CACHE = 1 << 19  # slots of a cache that tokens are appended to
CHOSEN = 1 << 16
INDEX_DIM = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: quantize (from bf16), dequantize (to bf16), requantize (576 to 656 bytes, codes kept),
            convert (656 to 576 bytes), append (with index keys) or gather (random slots to bf16).
        layout: of the cache, as results name it.
        n: tokens.
        options: of the layout.
    """

    op: str
    layout: str
    n: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As the results have it."""
        words = [f"layout={self.layout}", f"n={self.n}"]
        return " ".join(words + [f"{key}={value}" for key, value in self.options])

    @property
    def kv_layout(self) -> KVLayout:
        """Of the cache."""
        return LAYOUTS[self.layout]


_FP32 = (("scale_format", "fp32"),)
_SCALED = (("scale", 0.25),)
CASES = (
    *(Case("append", "656", n) for n in (1, 256, 4096)),
    Case("requantize", "576", MANY),
    Case("convert", "656", MANY),
    *(Case("quantize", layout, MANY) for layout in ("656", "576", "fp4", "584")),
    Case("quantize", "656", MANY, _FP32),
    Case("quantize", "576", MANY, _SCALED),
    *(Case("dequantize", layout, MANY) for layout in ("656", "576", "fp4", "584")),
    *(Case("gather", layout, CHOSEN) for layout in ("656", "576", "fp4", "584", "bf16")),
    Case("append", "656", 100_000),
    *(Case("append", layout, 256) for layout in ("bf16", "576", "fp4", "584")),
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
            writing the result at the rate of a copy.
    """

    op: str
    case: str
    implementation: str
    ours_us: float
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
        peer = {"peer": "xla" if self.xla_us else None, "peer_us": fields.pop("xla_us")}
        # Results are the same bytes, as the tests see.
        fields |= peer | {"flops": 0, "error": 0.0, "peer_error": None}
        return json.dumps(
            {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in fields.items()}
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """What a case does.

    Attributes:
        calls: endless; each starts the op.
        bytes: that it reads and writes.
        slots: lists of random slots that it reads, or none.
    """

    calls: Iterator[Call]
    bytes: int
    slots: Sequence[Array] = ()


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: takes the times.
        ceilings: of this GPU.
        environment: of the records.
        implementation: of our op.
        with_xla: also time the op by XLA.
        scale: all cases have so many times fewer tokens, for tests.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: str
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
        work = prepare(case, self.implementation, self.scale)
        start = time.perf_counter()
        jax.block_until_ready(next(work.calls)())
        first_call_s = time.perf_counter() - start
        ours_us = self.timer.measure(work.calls, jax.block_until_ready, what=case.name)
        xla_us = None
        if self.with_xla:
            calls = prepare(case, "xla", self.scale).calls
            xla_us = self.timer.measure(calls, jax.block_until_ready, what=case.name)
        gbps = work.bytes / ours_us / 1e3
        return Record(
            op=case.op,
            case=case.name,
            implementation=self.implementation,
            ours_us=ours_us,
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
        if not work.slots:
            return work.bytes / self.ceilings.copy_gbps / 1e3
        row_bytes = case.kv_layout.bytes_per_token()
        reading = Gather.for_rows(MANY // self.scale, row_bytes).measure(self.timer, work.slots)
        written = work.bytes - work.slots[0].size * row_bytes
        return reading + written / self.ceilings.copy_gbps / 1e3


def prepare(case: Case, implementation: str, scale: int = 1) -> Work:
    """The inputs of a case, and its calls."""
    n, layout, options = max(case.n // scale, 1), case.kv_layout, dict(case.options)
    width = layout.default_rank + 64
    latent_bytes, row_bytes = 2 * width, layout.bytes_per_token()
    how: Any = {"implementation": implementation}
    if case.op == "append":
        return _append(case, n, max(CACHE // scale, n), how)
    if case.op == "quantize":
        x = _latents(n, width)
        run = jax.jit(functools.partial(quantize, layout=layout, **options, **how))
        return Work(itertools.repeat(functools.partial(run, x)), n * (latent_bytes + row_bytes))
    if case.op == "gather":
        slots_of = MANY // scale
        rows = _rows(slots_of, layout)
        lists = [
            jax.random.randint(jax.random.key(i), (n,), 0, slots_of, jnp.int32) for i in range(4)
        ]
        read = jax.jit(lambda rows, slots: dequantize(rows, slots=slots, **how))
        calls = itertools.cycle([functools.partial(read, rows, slots) for slots in lists])
        return Work(calls, n * (latent_bytes + row_bytes), lists)
    rows = _rows(n, layout)
    if case.op == "dequantize":
        run = jax.jit(functools.partial(dequantize, **how))
        return Work(itertools.repeat(functools.partial(run, rows)), n * (latent_bytes + row_bytes))
    block, plain = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, KVLayout.FP8_NOPE_FP8_ROPE
    target = block if layout is plain else plain
    run = jax.jit(functools.partial(convert, layout=target, **how))
    size = n * (row_bytes + target.bytes_per_token())
    return Work(itertools.repeat(functools.partial(run, rows)), size)


def _append(case: Case, n: int, slots: int, how: Any) -> Work:
    cache = init_cache(case.kv_layout, num_pages=-(-slots // 64), index_dim=INDEX_DIM)
    width = cache.rows.width
    given = [
        (
            jax.random.permutation(jax.random.key(i), cache.num_slots)[:n].astype(jnp.int32),
            _latents(n, width),
            _latents(n, INDEX_DIM),
        )
        for i in range(4)
    ]
    write = jax.jit(functools.partial(append, **how), donate_argnums=0)
    held = [cache]

    def call(arguments: tuple[Array, Array, Array]) -> object:
        held[0] = write(held[0], *arguments)
        return held[0]

    calls = itertools.cycle([functools.partial(call, arguments) for arguments in given])
    return Work(calls, n * (2 * (width + INDEX_DIM) + cache.bytes_per_token + 4))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _latents(n: int, width: int) -> Array:
    return jax.random.normal(jax.random.key(n), (n, width), jnp.bfloat16)


def _rows(n: int, layout: KVLayout) -> Rows:
    return quantize(_latents(n, layout.default_rank + 64), layout)


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"cache, {first.environment.gpu}, µs ({first.method})",
        caption=f"copy {first.copy_gbps:.0f} GB/s",
    )
    made.add_column("case", overflow="fold")
    for name in ("ours", "xla", "floor", "GB/s", "of a copy", "first call s"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            f"{record.op} {record.case}",
            f"{record.ours_us:.1f}",
            "-" if record.xla_us is None else f"{record.xla_us:.1f}",
            f"{record.floor_us:.1f}",
            f"{record.gbps:.0f}",
            f"{record.of_copy:.0%}",
            f"{record.first_call_s:.1f}",
        )
    return made
