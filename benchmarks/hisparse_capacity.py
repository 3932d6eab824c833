"""Tokens per second of all layers' attention beside a model's weights, rows here or on the host.

The attention of DeepSeek-V3.2, all of it: projections, indexer, selection and attention over random
weights and random rows, by the layer that the demo's decode loop runs. A GPU also holds its share
of the experts; memory of that size is taken and not touched, so that what is left for caches ends
where it would.

The hidden states that enter the layers turn a little in each step, so that selections drift: the
part of their selected rows that was not in the buffer before is measured beside the time.

python -m benchmarks.hisparse_capacity --full 7 6 --hisparse 12
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

import jmla
from benchmarks import records
from jmla.cache import Cache
from jmla.hisparse import HiSparsePool, HiSparseState, admit, assign_pages
from jmla.model import MLAConfig, init_mla, mla_attention, rms_norm

PAGE = 64
STEPS = 4  # of one call
WARMUP = 4  # calls
GB = 10**9
V32 = MLAConfig(hidden_size=7168, num_heads=128, q_lora_rank=1536)

Layer = Cache | HiSparseState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; see `benchmarks.records.Record` for what is not told here.

    Attributes:
        case: `key=value` pairs.
        kind: where the rows are, "full" on the device or "hisparse".
        requests: of the batch.
        fits: whether the device has the memory; if not, nothing is measured.
        error: what it said if it has not.
        turned: how far hidden states turn in a step, sine of the angle.
        missed: of the selected rows, the share that was fetched; the newest tokens left out.
        step_ms: of all layers, the host's clock.
        ours_us: the same for one layer.
        tokens_per_s: of the batch.
        host_bytes: of the caches.
        device_bytes: likewise.
        weights_bytes: of the layers' weights.
        reserved_bytes: on the device beside caches, these weights included.
        usable_bytes: of the device, for all; the rest is not JAX's.
        filled_s: time to make and fill the caches.
        compiled_s: time to compile a call.
    """

    op: str = "hisparse_capacity"
    case: str
    kind: str
    requests: int
    fits: bool
    error: str = ""
    turned: float = 0.0
    missed: float = 0.0
    step_ms: float | None = None
    ours_us: float | None = None
    tokens_per_s: float | None = None
    host_bytes: int = 0
    device_bytes: int = 0
    weights_bytes: int = 0
    reserved_bytes: int = 0
    usable_bytes: int | None = None
    filled_s: float | None = None
    compiled_s: float | None = None
    method: str = f"wall, {STEPS} steps of a call, median of calls"
    environment: records.Environment

    def to_json(self) -> str:
        """One line, floats to five digits."""
        return records.to_json_line(self)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", type=int, nargs="*", default=[], help="counts of requests")
    parser.add_argument("--hisparse", type=int, nargs="*", default=[], help="rows on the host")
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument(
        "--reserved-gb",
        type=float,
        default=80.0,
        help="device memory for weights, in 10**9 bytes; with the fifth that JAX leaves alone "
        "as much as an eighth of 671 GB and what a server needs to run (default: %(default)s)",
    )
    parser.add_argument(
        "--turned", type=float, nargs="+", default=[0.02, 0.1], help="of hidden states in a step"
    )
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--commit", help="of the code (default: what git says)")
    return parser.parse_args(arguments)


def plan_of(kind: str, model: MLAConfig) -> jmla.Plan:
    """The block-scale FP8 plan of the kind."""
    return jmla.resolve(
        jmla.Config(
            num_heads=model.num_heads,
            sm_scale=model.sm_scale,
            kv_lora_rank=model.kv_lora_rank,
            index_topk=model.index_topk,
            index_head_dim=model.index_head_dim,
            kv_cache_dtype="fp8_e4m3",
            page_size=PAGE,
            hisparse=jmla.HiSparseConfig() if kind == "hisparse" else None,
        )
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_prompt(plan: jmla.Plan, context: int, key: Array) -> Cache:
    """One request's cache of random rows, its pages in order."""
    cache = plan.init_cache(context // PAGE)
    assert cache.index_keys is not None
    widths = cache.rows.width, cache.index_keys.dim
    latents, index_keys = (
        jax.random.normal(each, (context, width), jnp.bfloat16)
        for each, width in zip(jax.random.split(key), widths, strict=True)
    )
    return jmla.append(cache, jnp.arange(context, dtype=jnp.int32), latents, index_keys)


@functools.partial(jax.jit, static_argnums=1)
def _repeated(prompt: Cache, requests: int) -> Cache:
    """The cache of as many requests with the same rows, their pages one after the other."""
    return jax.tree.map(
        lambda leaf: jnp.tile(leaf, (requests, *[1] * (leaf.ndim - 1))) if leaf.ndim else leaf,
        prompt,
    )


_admit = jax.jit(admit, donate_argnums=0)


def host_layer(
    plan: jmla.Plan, requests: int, context: int, length: int, prompt: Cache
) -> tuple[HiSparseState, Array]:
    """A layer's host-resident cache with the prompt in every row of the batch; its page table."""
    pages = context // PAGE
    assert plan.config.hisparse is not None
    slots = plan.config.hisparse.buffer_rows(plan.config.index_topk) + 1
    sizes = dataclasses.replace(
        plan.hisparse_sizes(
            requests=requests, max_length=context, num_buffer_pages=requests * -(-slots // PAGE)
        ),
        num_pages=requests * pages,
    )
    pool = HiSparsePool.empty(sizes)
    for request in range(requests):
        pool = pool.reserve(request, context)
    state = plan.init_hisparse(sizes)
    state = assign_pages(state, jnp.array(pool.page_table), jnp.array(pool.buffer_table))
    in_order = jnp.arange(pages, dtype=jnp.int32)
    for request in range(requests):
        state = _admit(state, jnp.int32(request), jnp.int32(length), prompt, in_order)
    return state, jnp.array(pool.page_table)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    plan: jmla.Plan, model: MLAConfig, params: Any, x: Array, layer: Layer, batch: jmla.BatchMeta
) -> tuple[Array, Layer]:
    normed = rms_norm(x, jnp.ones_like(x[0]), model.norm_eps)
    attended = mla_attention(params, model, plan, normed, layer, batch, phase="decode")
    return x + attended.out, attended.cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    plan: jmla.Plan,
    model: MLAConfig,
    params: Sequence[Any],
    layers: Sequence[Layer],
    x: Array,
    lens: Array,
    page_table: Array,
    key: Array,
    turned: Array,
) -> tuple[tuple[Layer, ...], Array, Array, Array]:
    """`STEPS` steps of all layers: these after it, and inputs to go on from."""

    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        layers, x, lens = carry
        lens = lens + 1
        other = jax.random.normal(key, x.shape, jnp.float32)
        x = (jnp.sqrt(1 - turned**2) * x.astype(jnp.float32) + turned * other).astype(x.dtype)
        batch = jmla.make_batch(
            lens, jnp.ones_like(lens), page_table, num_tokens=lens.size, page_size=PAGE
        )
        h, after = x, []
        for weights, layer in zip(params, layers, strict=True):
            h, layer = _layer(plan, model, weights, h, layer, batch)
            after.append(layer)
        return (tuple(after), x, lens), h

    carry = tuple(layers), x, lens
    (after, x, lens), outs = jax.lax.scan(step, carry, jax.random.split(key, STEPS))
    return after, x, lens, outs[-1]


def measure(
    options: argparse.Namespace, environment: records.Environment, model: MLAConfig = V32
) -> Iterator[Record]:
    """A line for each count of requests that does not fit, or two and more if it does."""
    make = jax.jit(functools.partial(init_mla, config=model))
    params = [make(key) for key in jax.random.split(jax.random.key(0), options.layers)]
    weights_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    reserved = max(int(options.reserved_gb * GB), weights_bytes)
    # In the place of the experts, for as long as this runs.
    ballast = jax.block_until_ready(jnp.zeros(reserved - weights_bytes, jnp.uint8))
    tried = itertools.chain(
        (("full", b) for b in options.full), (("hisparse", b) for b in options.hisparse)
    )
    for kind, requests in tried:
        line = Record(
            case=f"kind={kind} layers={options.layers} b={requests} "
            f"s_kv={options.context} h={model.num_heads} topk={model.index_topk} layout=656",
            kind=kind,
            requests=requests,
            fits=True,
            weights_bytes=weights_bytes,
            reserved_bytes=weights_bytes + ballast.nbytes,
            usable_bytes=(jax.devices()[0].memory_stats() or {}).get("bytes_limit"),
            environment=environment,
        )
        try:
            yield from _measure_one(options, plan_of(kind, model), model, params, line)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = str(error).splitlines()[0]
            yield dataclasses.replace(line, fits=False, error=said)
        gc.collect()


def _measure_one(
    options: argparse.Namespace,
    plan: jmla.Plan,
    model: MLAConfig,
    params: Sequence[Any],
    line: Record,
) -> Iterator[Record]:
    b, pages = line.requests, options.context // PAGE
    calls = WARMUP + options.calls
    length = options.context - calls * STEPS
    start = time.perf_counter()
    prompt = random_prompt(plan, options.context, jax.random.key(1))
    layers: tuple[Layer, ...]
    # One by one: JAX waits ten seconds for what does not fit, once then and not for each layer.
    if line.kind == "hisparse":
        fill = functools.partial(host_layer, plan, b, options.context, length, prompt)
        made = [jax.block_until_ready(fill()) for _ in params]
        layers, page_table = tuple(layer for layer, _ in made), made[0][1]
        host, device = made[0][0].host_bytes, made[0][0].device_bytes
        del made
    else:
        layers = tuple(jax.block_until_ready(_repeated(prompt, b)) for _ in params)
        page_table = jnp.arange(b * pages, dtype=jnp.int32).reshape(b, pages)
        host, device = 0, b * prompt.num_slots * prompt.bytes_per_token
    del prompt
    filled_s = time.perf_counter() - start
    x = jax.random.normal(jax.random.key(2), (b, model.hidden_size), jnp.bfloat16)
    lens = jnp.full(b, length, jnp.int32)
    turned, key = jnp.float32(0), jax.random.key(3)
    start = time.perf_counter()
    program = decode.lower(plan, model, params, layers, x, lens, page_table, key, turned).compile()
    compiled_s = time.perf_counter() - start
    for number, share in enumerate(options.turned):
        times, turned, missed = [], jnp.float32(share), 0.0
        # The lengths start anew: what the steps before have appended is written over.
        lens = jnp.full(b, length, jnp.int32)
        for call in range(calls):
            key = jax.random.key(1000 * number + call)
            last = call == calls - 1
            before = _tokens(layers) if last else []
            start = time.perf_counter()
            layers, x, lens, out = program(params, layers, x, lens, page_table, key, turned)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / STEPS)
            if last and before:
                changed = sum(
                    int(jnp.sum(old != new))
                    for old, new in zip(before, _tokens(layers), strict=True)
                )
                # A slot is not filled twice in so few steps while a step's misses are few.
                missed = changed / (STEPS * len(params) * b * (model.index_topk - 1))
        step_s = statistics.median(times[WARMUP:])
        yield dataclasses.replace(
            line,
            turned=share,
            missed=missed,
            step_ms=1e3 * step_s,
            ours_us=1e6 * step_s / len(params),
            tokens_per_s=b / step_s,
            host_bytes=host * len(params),
            device_bytes=device * len(params),
            filled_s=filled_s,
            compiled_s=compiled_s,
        )


def _tokens(layers: Sequence[Layer]) -> list[Array]:
    """What the slots that the LRU rule manages hold, copied; of host-resident caches alone."""
    return [
        jnp.array(layer.residency.tokens[:, : layer.sizes.device_buffer_size])
        for layer in layers
        if isinstance(layer, HiSparseState)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each measurement, and append it to a file if asked to."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
    options = parse_arguments(arguments)
    console = Console(soft_wrap=True)
    for line in measure(options, records.environment(options.commit)):
        if options.out:
            records.append(line, options.out)
        console.print(line.to_json(), markup=False, highlight=False)


if __name__ == "__main__":
    main()
