"""Tokens per second of all layers' attention, rows on the device or on the host.

Each step appends a token to every request and every layer, and attends to a selection that drifts:
the attention of DeepSeek-V3.2, without its projections, its indexer and its experts, over random
rows. What fits is said beside it: the bytes of rows, index keys and buffers in both memories.

python -m benchmarks.hisparse_capacity --kind hisparse --requests 12
python -m benchmarks.hisparse_capacity --kind full --requests 3
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

import jmla
from benchmarks import records
from benchmarks.hisparse import PAGE, ROUNDS, Case, drifting
from benchmarks.inputs import LAYOUTS
from jmla.cache import Cache, init_cache
from jmla.hisparse import (
    HiSparsePool,
    HiSparseSizes,
    HiSparseState,
    admit,
    append,
    assign_pages,
    init_state,
    swap_in,
)
from jmla.topk import paged_indices

HEADS, INDEX_DIM, TOPK, BUFFER = 128, 128, 2048, 4096
SM_SCALE = (128 + 64) ** -0.5
STEPS = 4  # of one call
WARMUP = 4  # calls


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("full", "hisparse"), required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--layout", choices=LAYOUTS, default="656")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument(
        "--fresh", type=float, nargs="+", default=[0.02, 0.1], help="share of new positions"
    )
    parser.add_argument("--calls", type=int, default=8)
    return parser.parse_args(arguments)


def filled_cache(layout: str, requests: int, context: int) -> tuple[Cache, Array]:
    """A layer's cache of random rows, and its page table."""
    pages = context // PAGE
    cache = init_cache(
        LAYOUTS[layout], num_pages=requests * pages, page_size=PAGE, index_dim=INDEX_DIM
    )
    order = jax.random.permutation(jax.random.key(1), requests * pages)
    return cache, order.reshape(requests, pages).astype(jnp.int32)


def random_prompt(layout: str, context: int) -> Cache:
    """One request's rows of random values, its pages in order."""
    cache, _ = filled_cache(layout, 1, context)
    keys = jax.random.split(jax.random.key(2))
    latents, index_keys = (
        jax.random.normal(key, (context, width), jnp.bfloat16)
        for key, width in zip(keys, (cache.rows.width, INDEX_DIM), strict=True)
    )
    slots = jnp.arange(context, dtype=jnp.int32)
    return jax.jit(jmla.append, donate_argnums=0)(cache, slots, latents, index_keys)


def host_layer(options: argparse.Namespace, prompt: Cache) -> HiSparseState:
    """A layer's host-resident cache with the prompt in every row of the batch."""
    pages = options.context // PAGE
    sizes = HiSparseSizes(
        requests=options.requests,
        max_length=options.context,
        page_size=PAGE,
        num_pages=options.requests * pages,
        num_buffer_pages=options.requests * -(-(BUFFER + 1) // PAGE),
        device_buffer_size=BUFFER,
    )
    pool = HiSparsePool.empty(sizes)
    for request in range(options.requests):
        pool = pool.reserve(request, options.context)
    state = init_state(LAYOUTS[options.layout], sizes, index_dim=INDEX_DIM)
    state = assign_pages(state, jnp.array(pool.page_table), jnp.array(pool.buffer_table))
    in_order = jnp.arange(pages, dtype=jnp.int32)
    length = jnp.int32(options.context - 64)
    for request in range(options.requests):
        state = _admit(state, jnp.int32(request), length, prompt, in_order)
    return state


_admit = jax.jit(admit, donate_argnums=0)


@jax.jit
def _host_step(
    state: HiSparseState, q: Array, lens: Array, new: tuple[Array, Array], positions: Array
) -> tuple[HiSparseState, Array]:
    latents, keys = (x[:, None] for x in new)
    state = append(state, lens, latents, keys)
    state, slots = swap_in(state, positions[:, None], lens)
    out, _ = jmla.sparse_decode(q, state.buffer_rows, slots, sm_scale=SM_SCALE)
    return state, out


@jax.jit
def _full_step(
    layer: tuple[Cache, Array], q: Array, lens: Array, new: tuple[Array, Array], positions: Array
) -> tuple[tuple[Cache, Array], Array]:
    cache, table = layer
    own = paged_indices(lens[:, None] - 1, table, page_size=PAGE)
    cache = jmla.append(cache, own[:, 0], *new)
    slots = paged_indices(positions, table, page_size=PAGE)
    out, _ = jmla.sparse_decode(q, cache.rows, slots[:, None], sm_scale=SM_SCALE)
    return (cache, table), out


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def decode(
    kind: str, layers: Any, q: Array, lens: Array, new: tuple[Array, Array], selections: Array
) -> tuple[Any, Array, Array]:
    """A step of all layers for each of the selections; the layers after it."""
    one = _host_step if kind == "hisparse" else _full_step

    def step(carry: Any, positions: Array) -> tuple[Any, None]:
        layers, q, lens = carry
        lens = lens + 1
        # As in a model, a layer's selection has its newest token.
        positions = positions.at[:, -1].set(lens - 1)
        after = []
        for layer in layers:
            layer, out = one(layer, q, lens, new, positions)
            # A layer's queries wait for the layer before it.
            q = q.at[..., : out.shape[-1]].set(out)
            after.append(layer)
        return (tuple(after), q, lens), None

    (layers, q, lens), _ = jax.lax.scan(step, (layers, q, lens), selections)
    return layers, q, lens


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each share of new positions."""
    b, kind = options.requests, options.kind
    start = time.perf_counter()
    prompt = random_prompt(options.layout, options.context)
    layers: Any
    if kind == "hisparse":
        layers = tuple(host_layer(options, prompt) for _ in range(options.layers))
        first = layers[0]
        sizes = {"host_bytes": first.host_bytes, "device_bytes": first.device_bytes}
    else:
        layers = tuple(
            filled_cache(options.layout, b, options.context) for _ in range(options.layers)
        )
        cache = layers[0][0]
        sizes = {"host_bytes": 0, "device_bytes": cache.num_slots * cache.bytes_per_token}
    width = prompt.rows.width
    del prompt
    jax.block_until_ready(layers)
    filled_s = time.perf_counter() - start
    q = jax.random.normal(jax.random.key(3), (b, 1, options.heads, width), jnp.bfloat16)
    new = tuple(
        jax.random.normal(jax.random.key(4 + i), (b, size), jnp.bfloat16)
        for i, size in enumerate((width, INDEX_DIM))
    )
    lens = jnp.full(b, options.context - 64, jnp.int32)
    start = time.perf_counter()
    group = jax.ShapeDtypeStruct((STEPS, b, TOPK), jnp.int32)
    program = decode.lower(kind, layers, q, lens, new, group).compile()
    compiled_s = time.perf_counter() - start
    for fresh in options.fresh:
        case = Case("swap_in", b=b, fresh=fresh, topk=TOPK, buffer=BUFFER)
        choices = np.stack(drifting(case, options.context - 64, TOPK))
        groups = itertools.cycle(np.array_split(choices[:ROUNDS], ROUNDS // STEPS))
        times = []
        for selections in itertools.islice(groups, WARMUP + options.calls):
            given = jnp.asarray(selections)
            start = time.perf_counter()
            layers, q, _ = program(layers, q, lens, new, given)
            jax.block_until_ready(q)
            times.append((time.perf_counter() - start) / STEPS)
        step_s = statistics.median(times[WARMUP:])
        yield {
            "op": "hisparse_capacity",
            "kind": kind,
            "requests": b,
            "layers": options.layers,
            "context": options.context,
            "layout": options.layout,
            "heads": options.heads,
            "fresh": fresh,
            "step_ms": round(1e3 * step_s, 3),
            "tokens_per_s": round(b / step_s, 1),
            "layer_us": round(1e6 * step_s / options.layers, 1),
            **{name: size * options.layers for name, size in sizes.items()},
            "filled_s": round(filled_s, 1),
            "compiled_s": round(compiled_s, 1),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each share of new positions."""
    options = parse_arguments(arguments)
    environment = records.environment()
    console = Console(soft_wrap=True)
    for line in measure(options):
        line |= {"gpu": environment.gpu, "versions": environment.versions}
        line |= {"commit": environment.commit, "date": environment.date}
        console.print(json.dumps(line), markup=False, highlight=False)


if __name__ == "__main__":
    main()
