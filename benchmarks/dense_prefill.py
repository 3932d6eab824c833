"""Dense prefill of a first chunk: over latents, and over keys and values of each head.

A first chunk is attended by nothing but itself, so that its latents can be made the keys and values
of each head, which `jax.nn.dot_product_attention` takes. The other way, which any chunk can go, has
the query and the output in the space of the latents, and one key for all heads.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16
from rich.table import Table

from benchmarks.floors import Ceilings
from benchmarks.inputs import SM_SCALE
from benchmarks.records import Environment, to_json_line
from benchmarks.timing import MeasurementError, Timer
from jmla import make_batch
from jmla._dense_prefill import dense_prefill
from jmla.attention import Implementation
from jmla.batch import BatchMeta
from jmla.layouts import BF16Rows

PAGE_SIZE = 64
NOPE_DIM, ROPE_DIM, RANK, VALUE_DIM = 128, 64, 512, 128  # DeepSeek-V3
MOST_DIFFERENCE = 5e-2  # of two ways that round to bf16 in other places


@dataclasses.dataclass(frozen=True)
class Case:
    """The tokens of a request's first chunk, a multiple of 64, and the heads of a device."""

    tokens: int
    h: int

    @property
    def name(self) -> str:
        """The case on a command line."""
        return f"t{self.tokens}-h{self.h}"

    @property
    def flops(self) -> int:
        """Of both products with latents, of each token with those up to itself."""
        pairs = self.tokens * (self.tokens + 1) // 2
        return 2 * pairs * self.h * (RANK + ROPE_DIM + RANK)


CASES = (Case(512, 128), Case(2048, 128), Case(8192, 128), Case(2048, 16), Case(8192, 16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results.

    Attributes:
        op: the op's name.
        case: `key=value` pairs: tokens h.
        implementation: of attention over latents.
        absorbed_us: of all that follows the query's projection, up to values of each head.
        absorbed_attention_us: of its attention alone.
        decompressed_us: of the same with keys and values of each head.
        decompressed_attention_us: of its attention alone.
        decompressed_by: the implementation of that.
        difference: relative L2 distance of the two results.
        flops: of attention over latents.
        tflops: its rate.
        first_call_s: compilation and the first run, of all four.
        method: how times were taken.
        environment: where and when; its fields are keys of the line.
    """

    op: str
    case: str
    implementation: str
    absorbed_us: float
    absorbed_attention_us: float
    decompressed_us: float
    decompressed_attention_us: float
    decompressed_by: str
    difference: float
    flops: int
    tflops: float
    first_call_s: float
    method: str
    environment: Environment

    def to_json(self) -> str:
        """One line, floats to five digits."""
        return to_json_line(self)


class _Inputs(NamedTuple):
    nope: BFloat16[Array, "t h 128"]
    rope: BFloat16[Array, "t h 64"]
    latents: BFloat16[Array, "t 576"]
    k_up: BFloat16[Array, "h 128 512"]
    v_up: BFloat16[Array, "h 512 128"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cases.

    Attributes:
        timer: how a call is timed.
        ceilings: rates of this GPU, which no record of these has.
        environment: where and when.
        implementation: of attention over latents; None takes the library's choice.
        decompressed_by: of attention over keys of each head.
    """

    timer: Timer
    ceilings: Ceilings
    environment: Environment
    implementation: Implementation | None = "mosaic_gpu"
    decompressed_by: Literal["cudnn", "xla"] = "cudnn"

    def run(
        self, cases: Sequence[Case], *, failed: Callable[[str, Exception], None]
    ) -> Iterator[Record]:
        """A record for each case.

        Args:
            cases: what to measure.
            failed: gets the name and the reason of each case that has no record.
        """
        for case in cases:
            try:
                yield self._measure(case)
            # Whatever is wrong with one case must not cost the others their results.
            except Exception as error:
                failed(case.name, error)

    def _measure(self, case: Case) -> Record:
        start = time.perf_counter()
        inputs = _inputs(case)
        pages = case.tokens // PAGE_SIZE
        length = jnp.full(1, case.tokens, jnp.int32)
        batch = make_batch(
            length,
            length,
            jnp.asarray(np.random.default_rng(0).permutation(pages)[None], jnp.int32),
            num_tokens=case.tokens,
            page_size=PAGE_SIZE,
        )
        cache = jnp.zeros((pages, PAGE_SIZE, RANK + ROPE_DIM), jnp.bfloat16)
        rows = BF16Rows(
            cache.at[batch.page_table[0]].set(inputs.latents.reshape(pages, PAGE_SIZE, -1)),
            rank=RANK,
            rope_dim=ROPE_DIM,
        )
        over_latents = functools.partial(_over_latents, self.implementation)
        over_heads = functools.partial(_over_heads, self.decompressed_by)

        def absorbed(inputs: _Inputs, rows: BF16Rows, batch: BatchMeta) -> Array:
            out = over_latents(_absorbed_query(inputs), rows, batch)
            return jnp.einsum("thr,hrv->thv", out, inputs.v_up)

        def decompressed(inputs: _Inputs) -> Array:
            return over_heads(*_heads(inputs))

        made = jax.jit(_absorbed_query)(inputs), jax.jit(_heads)(inputs)
        calls = [
            (jax.jit(absorbed), (inputs, rows, batch)),
            (jax.jit(over_latents), (made[0], rows, batch)),
            (jax.jit(decompressed), (inputs,)),
            (jax.jit(over_heads), made[1]),
        ]
        results = jax.block_until_ready([call(*arguments) for call, arguments in calls])
        first_call_s = time.perf_counter() - start
        a, b = (np.asarray(x, np.float32) for x in (results[0], results[2]))
        difference = float(np.linalg.norm(a - b) / np.linalg.norm(a))
        # Also where it is no number.
        if not difference < MOST_DIFFERENCE:
            raise MeasurementError(f"{case.name}: {difference=}: expected {MOST_DIFFERENCE=}")
        us = [
            self.timer.measure(
                itertools.repeat(functools.partial(call, *arguments)),
                jax.block_until_ready,
                what=case.name,
            )
            for call, arguments in calls
        ]
        return Record(
            op="dense_prefill",
            case=f"tokens={case.tokens} h={case.h}",
            implementation=self.implementation or "auto",
            absorbed_us=us[0],
            absorbed_attention_us=us[1],
            decompressed_us=us[2],
            decompressed_attention_us=us[3],
            decompressed_by=self.decompressed_by,
            difference=difference,
            flops=case.flops,
            tflops=1e-6 * case.flops / us[1],
            first_call_s=first_call_s,
            method=self.timer.method,
            environment=self.environment,
        )


def _inputs(case: Case) -> _Inputs:
    """Of logits of a standard deviation of about 1."""
    shapes = {
        (case.tokens, case.h, NOPE_DIM): 0.5,
        (case.tokens, case.h, ROPE_DIM): 0.5,
        (case.tokens, RANK + ROPE_DIM): 1.0,
        (case.h, NOPE_DIM, RANK): RANK**-0.5,
        (case.h, RANK, VALUE_DIM): RANK**-0.5,
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return _Inputs(
        *(
            (std * jax.random.normal(key, shape)).astype(jnp.bfloat16)
            for key, (shape, std) in zip(keys, shapes.items(), strict=True)
        )
    )


def _absorbed_query(inputs: _Inputs) -> Array:
    nope = jnp.einsum("thd,hdr->thr", inputs.nope, inputs.k_up)
    return jnp.concatenate([nope, inputs.rope], axis=-1)


def _over_latents(
    implementation: Implementation | None, q: Array, rows: BF16Rows, batch: BatchMeta
) -> Array:
    out, _ = dense_prefill(q, rows, batch, sm_scale=SM_SCALE, implementation=implementation)
    return out


def _heads(inputs: _Inputs) -> tuple[Array, Array, Array]:
    """Query, keys and values of each head."""
    nope, rope = jnp.split(inputs.latents, [RANK], axis=-1)
    shared = jnp.broadcast_to(rope[:, None], inputs.rope.shape)
    keys = jnp.concatenate([jnp.einsum("sr,hdr->shd", nope, inputs.k_up), shared], axis=-1)
    values = jnp.einsum("sr,hrv->shv", nope, inputs.v_up)
    return jnp.concatenate([inputs.nope, inputs.rope], axis=-1), keys, values


def _over_heads(by: Literal["cudnn", "xla"], q: Array, keys: Array, values: Array) -> Array:
    # The function takes values of the width of keys.
    padded = jnp.pad(values, ((0, 0), (0, 0), (0, keys.shape[-1] - VALUE_DIM)))
    out = jax.nn.dot_product_attention(
        q[None], keys[None], padded[None], scale=SM_SCALE, is_causal=True, implementation=by
    )
    return out[0, ..., :VALUE_DIM]


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"{first.op}, {first.environment.gpu}, µs ({first.method})",
        caption=f"heads: keys and values of each head, by {first.decompressed_by}",
    )
    made.add_column("case", overflow="fold")
    for name in ("latents", "attention", "TFLOPS", "heads", "attention", "speedup"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            record.case,
            f"{record.absorbed_us:.1f}",
            f"{record.absorbed_attention_us:.1f}",
            f"{record.tflops:.0f}",
            f"{record.decompressed_us:.1f}",
            f"{record.decompressed_attention_us:.1f}",
            f"{record.absorbed_us / record.decompressed_us:.2f}",
        )
    return made
