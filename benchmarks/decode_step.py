"""One decode step of a layer from index queries to attention, beside the sum of the peers' kernels.

Index queries are rotated and quantised, new tokens appended, the cached keys scored, the best
selected as slots, and attended to: all in one jit, into a cache that is updated in place. The
peers' kernels, one after the other, are DeepGEMM's logits, SGLang's fast_topk_transform and
FlashMLA's sparse decode; preparing the query and appending are not among them.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int
from rich.table import Table

import jmla
from benchmarks.deep_gemm import DeepGEMM
from benchmarks.floors import Ceilings
from benchmarks.inputs import QUERY_STD, SM_SCALE, random_cache
from benchmarks.peers import FlashMLA
from benchmarks.records import Environment, cell, to_json_line
from benchmarks.timing import MeasurementError, Timer
from jmla import Cache, KVLayout, RawIndexQueries
from jmla.layouts import PagedIndexKeyRows, paged_index_keys, quantize_index_keys
from jmla.rope import Rope, cos_sin

PAGE, DIM, WIDTH, ROPE_DIM = 64, 128, 576, 64
ROW_BYTES = 656
_LARGEST_ERROR = 0.05
_KEYS_PER_STEP = 1 << 16


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a step: DeepSeek-V3.2's but for the batch.

    Attributes:
        b: requests, of one new token each.
        s_kv: tokens of a request.
        heads: of the attention.
        index_heads: of the indexer.
        topk: tokens that are attended to.
    """

    b: int
    s_kv: int
    heads: int = 128
    index_heads: int = 64
    topk: int = 2048

    @property
    def name(self) -> str:
        """The case on a command line."""
        return f"b{self.b}-s_kv{self.s_kv}-h{self.heads}"

    @property
    def num_bytes(self) -> int:
        """Of the index keys and of the rows that are attended to."""
        return self.b * (self.s_kv * (DIM + 4) + self.topk * ROW_BYTES)

    @property
    def flops(self) -> int:
        """Of the products of the indexer and of the attention."""
        indexer = 2 * self.s_kv * self.index_heads * DIM
        return self.b * (indexer + 2 * self.topk * self.heads * (WIDTH + 512))


CASES = (Case(64, 32768), Case(128, 32768), Case(64, 131072), Case(1, 32768))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; None stands for what was not measured.

    Attributes:
        op: the op's name.
        case: `key=value` pairs: b s_kv h index_h topk.
        implementation: of our ops.
        ours_us: our time of the whole step.
        peer: the other libraries.
        peer_us: the sum of their kernels' times.
        peer_selection_us: of that, logits and selection.
        floor_us: of `bytes` at the rate of a large copy.
        bytes: of index keys and of rows that are attended to.
        flops: of all products.
        first_call_s: compilation and the first run.
        error: relative L2 error of the first request's output against the step by XLA.
        peer_error: none.
        copy_gbps: rate of a large copy, bytes read and written.
        method: how times were taken.
        environment: where and when; its fields are keys of the line.
    """

    op: str
    case: str
    implementation: str
    ours_us: float
    peer: str | None
    peer_us: float | None
    peer_selection_us: float | None
    floor_us: float
    bytes: int
    flops: int
    first_call_s: float
    error: float
    peer_error: float | None
    copy_gbps: float
    method: str
    environment: Environment

    def to_json(self) -> str:
        """One line, floats to five digits."""
        return to_json_line(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one step.

    Attributes:
        q: bf16 [b, 1, heads, 576].
        index_q: bf16 [b, index_heads, 128] with their weights, before they are rotated.
        latents: bf16 [b, 576], of the new tokens.
        keys: bf16 [b, 128], of the same.
        slots: int32 [b], where they are stored: each request's last.
        page_table: int32 [b, pages].
        lengths: int32 [b].
    """

    q: BFloat16[Array, "b 1 h width"]
    index_q: RawIndexQueries
    latents: BFloat16[Array, "b width"]
    keys: BFloat16[Array, "b dim"]
    slots: Int[Array, " b"]
    page_table: Int[Array, "b pages"]
    lengths: Int[Array, " b"]

    def first(self) -> "Inputs":
        """Those of the first request."""
        return jax.tree.map(lambda x: x[:1], self)


def step(
    cache: Cache, inputs: Inputs, *, topk: int, implementation: Any
) -> tuple[Cache, BFloat16[Array, "b 1 h 512"], Int[Array, "b topk"]]:
    """The cache with the new tokens, what their queries attend to, and where."""
    queries, weights = jmla.prepare_index_query(inputs.index_q, implementation=implementation)
    cache = jmla.append(
        cache, inputs.slots, inputs.latents, inputs.keys, implementation=implementation
    )
    assert cache.index_keys is not None
    slots = jmla.paged_indexer_topk(
        queries[:, None],
        weights[:, None],
        cache.index_keys,
        inputs.page_table,
        inputs.lengths[:, None],
        topk,
        slots=True,
        implementation=implementation,
    )
    out, _ = jmla.sparse_decode(
        inputs.q, cache.rows, slots, sm_scale=SM_SCALE, implementation=implementation
    )
    return cache, out, slots[:, 0]


class Stepper:
    """Steps that hand the cache on; as a call it is one of them."""

    def __init__(self, cache: Cache, inputs: Inputs, run: Callable[..., Any]) -> None:
        """`run` takes the cache, which it may reuse, and the inputs."""
        self.cache, self._inputs, self._run = cache, inputs, run

    def __call__(self) -> tuple[Array, Array]:
        """What queries attend to, and where."""
        self.cache, *results = self._run(self.cache, self._inputs)
        return results[0], results[1]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: how a call is timed, on both sides alike.
        ceilings: rates of this GPU, from the same run.
        environment: where and when.
        implementation: of our ops; None takes the library's choice.
        with_peer: also measure the peers.
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
        cache, inputs = draw(case)
        one = functools.partial(step, topk=case.topk, implementation="xla")
        exact = np.asarray(jax.jit(one)(cache, inputs.first())[1], np.float32)
        ours = functools.partial(step, topk=case.topk, implementation=self.implementation)
        stepper = Stepper(cache, inputs, jax.jit(ours, donate_argnums=0))
        del cache
        start = time.perf_counter()
        out, slots = jax.block_until_ready(stepper())
        first_call_s = time.perf_counter() - start
        error = np.linalg.norm(np.asarray(out[:1], np.float32) - exact) / np.linalg.norm(exact)
        # Both choose among millions of pairs: now and then another one at the edge.
        if not error < _LARGEST_ERROR:
            raise MeasurementError(f"{case.name}: {error=}: expected less than {_LARGEST_ERROR}")
        ours_us = self.timer.measure(
            itertools.repeat(stepper), jax.block_until_ready, what=f"ours, {case.name}"
        )
        selection_us: float | None = None
        attention_us: float | None = None
        if self.with_peer:
            selection_us, attention_us = self._measure_peers(case, stepper.cache, inputs, slots)
        return Record(
            op="decode_step",
            case=(
                f"b={case.b} s_kv={case.s_kv} h={case.heads} index_h={case.index_heads} "
                f"topk={case.topk}"
            ),
            implementation=self.implementation or "default",
            ours_us=ours_us,
            peer="deep_gemm + fast_topk_transform + flashmla" if attention_us else None,
            peer_us=selection_us + attention_us if selection_us and attention_us else None,
            peer_selection_us=selection_us,
            floor_us=case.num_bytes / self.ceilings.copy_gbps / 1e3,
            bytes=case.num_bytes,
            flops=case.flops,
            first_call_s=first_call_s,
            error=float(error),
            peer_error=None,
            copy_gbps=self.ceilings.copy_gbps,
            method=self.timer.method,
            environment=self.environment,
        )

    def _measure_peers(
        self, case: Case, cache: Cache, inputs: Inputs, slots: Array
    ) -> tuple[float, float]:
        scorer = DeepGEMM.load()
        queries, weights = jmla.prepare_index_query(inputs.index_q)
        assert isinstance(cache.index_keys, PagedIndexKeyRows)
        select = scorer.selecting_call(
            queries[:, None],
            weights[:, None],
            cache.index_keys.pack(),
            inputs.page_table,
            inputs.lengths[:, None],
            k=case.topk,
        )
        attention = FlashMLA.over(jax.jit(jmla.to_bytes)(cache.rows), sm_scale=SM_SCALE)
        attend = attention.call(inputs.q, slots[:, None], attention.metadata())
        return (
            self.timer.measure(itertools.repeat(select), scorer.wait, what="peers' selection"),
            self.timer.measure(itertools.repeat(attend), attention.wait, what="FlashMLA"),
        )


def draw(case: Case) -> tuple[Cache, Inputs]:
    """A cache that the requests' tokens fill, in pages in no order, and a step's inputs."""
    tokens = case.b * case.s_kv
    rows = random_cache(KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, slots=tokens, page_size=PAGE)
    packed = jax.block_until_ready(_packed_keys(tokens))
    cache = Cache(rows, paged_index_keys(packed, page_size=PAGE, dim=DIM))
    table = np.random.default_rng(0).permutation(tokens // PAGE).reshape(case.b, -1)
    last = table[:, (case.s_kv - 1) // PAGE] * PAGE + (case.s_kv - 1) % PAGE

    def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
        return scale * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    inputs = Inputs(
        q=normal(1, case.b, 1, case.heads, WIDTH, scale=QUERY_STD),
        index_q=RawIndexQueries(
            normal(2, case.b, case.index_heads, DIM),
            normal(3, case.b, case.index_heads).astype(jnp.float32),
            *cos_sin(jnp.full(case.b, case.s_kv - 1), Rope(), ROPE_DIM),
            interleaved=False,
        ),
        latents=normal(4, case.b, WIDTH),
        keys=normal(5, case.b, DIM),
        slots=jnp.asarray(last, jnp.int32),
        page_table=jnp.asarray(table, jnp.int32),
        lengths=jnp.full(case.b, case.s_kv, jnp.int32),
    )
    return cache, inputs


@functools.partial(jax.jit, static_argnums=0)
def _packed_keys(count: int) -> Array:
    """u8 [pages, 8448] of random keys."""
    size = min(count, _KEYS_PER_STEP)

    def some(key: Array) -> Array:
        keys = jax.random.normal(key, (size // PAGE, PAGE, DIM), jnp.bfloat16)
        return quantize_index_keys(keys).pack()

    pages = jax.lax.map(some, jax.random.split(jax.random.key(7), count // size))
    return pages.reshape(count // PAGE, -1)


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"{first.op}, {first.environment.gpu}, µs ({first.method})",
        caption=f"floor: index keys and rows at the {first.copy_gbps:.0f} GB/s of a copy",
    )
    made.add_column("case", overflow="fold")
    for name in ("ours", "peers", "of it selection", "speedup", "floor", "error", "first call s"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            record.case,
            f"{record.ours_us:.1f}",
            cell(record.peer_us, ".1f"),
            cell(record.peer_selection_us, ".1f"),
            cell(record.peer_us and record.peer_us / record.ours_us, ".2f"),
            f"{record.floor_us:.1f}",
            f"{record.error:.1e}",
            f"{record.first_call_s:.1f}",
        )
    return made
