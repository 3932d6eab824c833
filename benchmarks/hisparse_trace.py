"""How often a buffer holds what the demo model selects: hits by step, layer and buffer size.

The model reads a text but for its end, then decodes that end byte by byte, teacher-forced. What its
indexers select in each step goes through the LRU rule of `jmla.hisparse` at several buffer sizes.

python -m benchmarks.hisparse_trace --text some_file.py --out docs/hisparse
"""

import argparse
import argparse as default_text
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from rich.console import Console

from examples.byte_lm import ByteLMConfig, Params, load_params, mlp
from examples.generation import new_caches, prefill_chunk
from jmla import BatchMeta, Cache, Config, Plan, make_batch, resolve
from jmla.hisparse import HiSparsePool, HiSparseSizes, Residency, plan_swap
from jmla.hisparse.placement import place_new, place_prompt
from jmla.model import mla_attention, rms_norm

WEIGHTS = Path(__file__).parents[1] / "examples" / "weights" / "byte_lm.safetensors"
CHUNK = 512
PAGE = 64
SIZES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Buffer sizes, in top-k."""


def selections(
    params: Params, config: ByteLMConfig, text: np.ndarray, steps: int
) -> Int[np.ndarray, "steps layers k"]:
    """What each layer selects for each of the text's last `steps` bytes, after all before."""
    mla = config.mla
    plan = resolve(
        Config(
            num_heads=mla.num_heads,
            sm_scale=mla.sm_scale,
            page_size=PAGE,
            index_topk=mla.index_topk,
            kv_lora_rank=mla.kv_lora_rank,
            rope_dim=mla.qk_rope_head_dim,
            index_head_dim=mla.index_head_dim,
        )
    )
    caches, table = new_caches(plan, config, requests=1, context=len(text))
    zero = jnp.zeros(1, jnp.int32)
    prompt = len(text) - steps
    for stored in range(0, prompt, CHUNK):
        count = min(CHUNK, prompt - stored)
        tokens = np.zeros(CHUNK, np.int32)
        tokens[:count] = text[stored : stored + count]
        caches, _ = prefill_chunk(
            params,
            caches,
            table,
            zero + stored,
            zero + count,
            jnp.asarray(tokens),
            config=config,
            plan=plan,
        )
    run = jax.jit(functools.partial(_decode, config, plan), donate_argnums=1)
    chosen = run(params, caches, table, zero + prompt, jnp.asarray(text[prompt:], jnp.int32))
    return np.asarray(chosen)


def _decode(
    config: ByteLMConfig,
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    table: Array,
    stored: Array,
    tokens: Array,
) -> Array:
    def step(carry: Any, token: Array) -> tuple[Any, Array]:
        caches, stored = carry
        one = jnp.ones_like(stored)
        batch = make_batch(stored + one, one, table, num_tokens=1, page_size=PAGE)
        caches, chosen = _layers(config, plan, params, caches, batch, token[None])
        return (caches, stored + 1), chosen

    return jax.lax.scan(step, (caches, stored), tokens)[1]


def _layers(
    config: ByteLMConfig,
    plan: Plan,
    params: Params,
    caches: tuple[Cache, ...],
    batch: BatchMeta,
    tokens: Array,
) -> tuple[tuple[Any, ...], Array]:
    x = params["embed"][tokens]
    after, chosen = [], []
    for layer, cache in zip(params["layers"], caches, strict=True):
        normed = rms_norm(x, layer["attention_norm"], config.mla.norm_eps)
        attended = mla_attention(
            layer["attention"], config.mla, plan, normed, cache, batch, phase="decode"
        )
        x = x + attended.out
        x = x + mlp(layer, config, x)
        after.append(attended.cache)
        assert attended.positions is not None
        chosen.append(attended.positions[0])
    return tuple(after), jnp.stack(chosen)


def misses(
    chosen: Int[np.ndarray, "steps layers k"], prompt: int, size: int
) -> Int[np.ndarray, "steps layers"]:
    """How many of the selected positions are not in a buffer of `size` slots."""
    steps, layers, _ = chosen.shape
    length = prompt + steps
    pages = -(-length // PAGE)
    buffer_pages = -(-(size + 1) // PAGE)
    sizes = HiSparseSizes(
        requests=layers,
        max_length=length,
        page_size=PAGE,
        num_pages=layers * pages,
        num_buffer_pages=layers * buffer_pages,
        device_buffer_size=size,
    )
    pool = HiSparsePool.empty(sizes)
    residency = Residency.empty(sizes)
    for layer in range(layers):
        pool = pool.reserve(layer, length)
        residency = place_prompt(residency, jnp.int32(layer), jnp.int32(prompt))
    tables = jnp.asarray(pool.page_table), jnp.asarray(pool.buffer_table)

    @jax.jit
    def run(tokens: Array, lru: Array, chosen: Array) -> Array:
        def step(carry: Any, positions: Array) -> tuple[Any, Array]:
            residency, lens = carry
            residency, _, _ = place_new(residency, lens, 1)
            residency, swap = plan_swap(residency, positions, lens)
            return (residency, lens + 1), jnp.sum(swap.sources >= 0, axis=1)

        lens = jnp.full(layers, prompt + 1, jnp.int32)
        start = Residency(*tables, tokens, lru, sizes), lens
        return jax.lax.scan(step, start, chosen)[1]

    return np.asarray(run(residency.tokens, residency.lru, jnp.asarray(chosen)))


def plot(result: dict[str, Any], path: Path) -> None:
    """Hit rate by step for some buffer sizes, and by buffer size for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    k, window = result["topk"], 32
    figure, (by_step, by_size) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for entry in result["sizes"]:
        if entry["size"] / k not in (1.0, 2.0, 4.0):
            continue
        hit = 1 - np.mean(entry["misses"], axis=1) / k
        smooth = np.convolve(hit, np.ones(window) / window, mode="valid")
        by_step.plot(smooth, label=f"{entry['size']} slots, {entry['size'] / k:g} times top-k")
    by_step.set(xlabel="step", ylabel=f"hit rate, mean of layers and of {window} steps")
    by_step.set_ylim(0.5, 1)
    by_step.legend(loc="lower left")
    ratios = [entry["size"] / k for entry in result["sizes"]]
    for layer in range(result["layers"]):
        hits = [1 - np.mean(entry["misses"], axis=0)[layer] / k for entry in result["sizes"]]
        by_size.plot(ratios, hits, marker="o", label=f"layer {layer}")
    by_size.set(xlabel="slots of the buffer, in top-k", ylabel="hit rate, mean of steps")
    by_size.legend()
    for axes in (by_step, by_size):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Hits in the device buffer: demo model, top-k {k}, {result['context']} bytes")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record, print a line for each size, write `trace.json` and `trace.png`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=Path(str(default_text.__file__)))
    parser.add_argument("--context", type=int, default=8192, help="bytes of the text")
    parser.add_argument("--steps", type=int, default=1024, help="of them decoded")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the numbers and plot")
    options = parser.parse_args(arguments)
    config = ByteLMConfig()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params, _ = load_params(options.weights, config, dtype=dtype)
    text = np.frombuffer(options.text.read_bytes()[: options.context], np.uint8).astype(np.int32)
    chosen = selections(params, config, text, options.steps)
    k, prompt = chosen.shape[2], len(text) - options.steps
    result: dict[str, Any] = {
        "text": options.text.name,
        "context": len(text),
        "topk": k,
        "layers": chosen.shape[1],
        "device": jax.devices()[0].device_kind,
        "sizes": [],
    }
    console = Console()
    for ratio in SIZES:
        size = round(ratio * k)
        missed = misses(chosen, prompt, size)
        result["sizes"].append({"size": size, "misses": missed.tolist()})
        hit, worst = 1 - missed.mean() / k, missed.max()
        console.print(f"{size} slots: hit rate {hit:.4f}, most misses of a step and layer {worst}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "trace.json").write_text(json.dumps(result) + "\n")
    plot(result, options.out / "trace.png")


if __name__ == "__main__":
    main()
