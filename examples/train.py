"""Train the example model on the standard library's sources, by the published three-stage recipe.

python -m examples.train --out examples/weights/byte_lm.safetensors
"""

import argparse
import json
import math
import platform
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

from examples.byte_lm import ByteLMConfig, Params, init_params, load_params, save_params
from examples.corpus import HELD_OUT, Corpus, held_out_windows, training_corpus
from examples.training import DenseAttention, Stage, losses

# Steps between two looks at the losses; one compiled call.
STEPS_A_CALL = 20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the safetensors go")
    parser.add_argument(
        "--library", type=Path, help="standard library folder (default: this Python's)"
    )
    parser.add_argument(
        "--state", type=Path, help="file to resume from and to save to after each stage"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-a-step", type=int, default=131072)
    for name, steps in (
        ("short", 2000),
        ("dense", 1000),
        ("warmup", 200),
        ("sparse", 400),
        ("fp4", 100),
    ):
        parser.add_argument(f"--{name}-steps", type=int, default=steps)
    parser.add_argument("--short-context", type=int, default=1024)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--attention", choices=("cudnn", "xla"), default="cudnn")
    return parser.parse_args(arguments)


def make_steps(objective, optimizer, data, context: int, batch: int):
    """A compiled function that makes `STEPS_A_CALL` optimizer steps on random windows of `data`.

    Both parts of `objective` are minimised; a frozen parameter is the optimizer's business.
    """

    def loss(params: Params, tokens):
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        entropy, divergence = objective(half, tokens=tokens)
        return entropy + divergence, (entropy, divergence)

    def step(carry, key):
        params, state = carry
        starts = jax.random.randint(key, (batch,), 0, data.shape[0] - context - 1)
        tokens = data[starts[:, None] + jnp.arange(context + 1)]
        gradients, report = jax.grad(loss, has_aux=True)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), report

    @partial(jax.jit, donate_argnums=(0,))
    def steps(carry, key):
        carry, reports = jax.lax.scan(step, carry, jax.random.split(key, STEPS_A_CALL))
        return carry, jax.tree.map(jnp.mean, reports)

    return steps


def is_index_parameter(path, _) -> bool:
    """Whether a parameter belongs to the indexer."""
    return any("index_" in str(getattr(entry, "key", "")) for entry in path)


def make_optimizer(stage: Stage, peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and a cosine; in the warm-up stage only the indexer's parameters move."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, max(steps // 20, 1), max(steps, 2), peak * 0.05
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=0.05,
            mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p),
        ),
    )
    if stage != "warmup":
        return optimizer
    return optax.multi_transform(
        {True: optimizer, False: optax.set_to_zero()},
        lambda params: jax.tree_util.tree_map_with_path(is_index_parameter, params),
    )


def held_out_loss(
    params: Params,
    config: ByteLMConfig,
    stage: Stage,
    attention: DenseAttention,
    context: int,
    library: Path | None,
) -> tuple[float, float]:
    """Bits per byte over held-out windows of `context`, and the indexer's divergence there."""
    count = 8 if context > 4096 else 24
    windows = jnp.asarray(held_out_windows(context + 1, count, library))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    measure = jax.jit(lambda p, t: losses(p, config, t, stage=stage, attention=attention))
    values = [measure(half, window[None].astype(jnp.int32)) for window in windows]
    entropy, divergence = (float(np.mean([v[i] for v in values])) for i in (0, 1))
    return entropy / math.log(2), divergence


def provenance(
    options: argparse.Namespace, corpus: Corpus, done: dict[str, dict]
) -> dict[str, str]:
    """What the weights file says about how it was made; no paths of this machine."""
    settings = (
        "seed",
        "tokens_a_step",
        "short_steps",
        "dense_steps",
        "warmup_steps",
        "sparse_steps",
        "fp4_steps",
        "short_context",
        "context",
    )
    flags = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in settings]
    return {
        "command": " ".join(["python -m examples.train", *flags]),
        "stages": json.dumps(done),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "files": str(len(corpus.files)),
        "bytes": str(corpus.data.size),
        "sha256": corpus.sha256,
        "held_out": " ".join(HELD_OUT),
    }


def run_stage(
    name: str,
    carry,
    step_calls,
    *,
    steps: int,
    seed: int,
    console: Console,
) -> Params:
    """Call `step_calls` until `steps` are done; the trained parameters."""
    start = time.perf_counter()
    with Progress(console=console, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(name, total=steps)
        calls = math.ceil(steps / STEPS_A_CALL)
        for call in range(calls):
            key = jax.random.fold_in(jax.random.key(seed), call)
            carry, (entropy, divergence) = step_calls(carry, key)
            bits = float(entropy) / math.log(2)
            progress.advance(task, STEPS_A_CALL)
            if call % 5 == 0 or call + 1 == calls:
                console.print(
                    f"{name} {(call + 1) * STEPS_A_CALL}/{steps}: {bits:.4f} bits/byte, "
                    f"indexer {float(divergence):.4f}, {time.perf_counter() - start:.1f} s"
                )
    return carry[0]


def main(arguments: list[str] | None = None) -> None:
    """Run the stages and write the weights after each."""
    options = parse_arguments(arguments)
    console = Console()
    config = ByteLMConfig()
    corpus = training_corpus(options.library)
    console.print(
        f"{len(corpus.files)} files, {corpus.data.size} bytes, sha256 {corpus.sha256[:16]}"
    )
    data = jnp.asarray(corpus.data).astype(jnp.int32)
    schedule: list[tuple[str, Stage, int, int, float]] = [
        ("short", "dense", options.short_steps, options.short_context, 3e-3),
        ("dense", "dense", options.dense_steps, options.context, 1e-3),
        ("warmup", "warmup", options.warmup_steps, options.context, 3e-3),
        ("sparse", "sparse", options.sparse_steps, options.context, 5e-4),
        ("fp4", "sparse", options.fp4_steps, options.context, 3e-4),
    ]
    params = init_params(jax.random.key(options.seed), config)
    done: dict[str, dict] = {}
    if options.state and options.state.is_file():
        params, saved = load_params(options.state, config, dtype=jnp.float32)
        done = json.loads(saved["stages"])
    for number, (name, stage, steps, context, peak) in enumerate(schedule):
        if name in done:
            continue
        start = time.perf_counter()
        # Probabilities of every layer are held in the later stages: half the batch fits.
        tokens = options.tokens_a_step // (1 if stage == "dense" else 2)
        optimizer = make_optimizer(stage, peak, steps)
        batch = max(tokens // context, 1)
        objective = partial(
            losses,
            config=config,
            stage=stage,
            attention=options.attention,
            fp4_sequences=(batch + 1) // 2 if name == "fp4" else 0,
        )
        step_calls = make_steps(objective, optimizer, data, context, batch)
        params = run_stage(
            name,
            (params, optimizer.init(params)),
            step_calls,
            steps=steps,
            seed=options.seed + 1 + number,
            console=console,
        )
        bits, divergence = held_out_loss(
            params, config, stage, options.attention, context, options.library
        )
        done[name] = {
            "steps": steps,
            "context": context,
            "held_out_bits_per_byte": round(bits, 4),
            "indexer_divergence": round(divergence, 4),
            "seconds": round(time.perf_counter() - start, 1),
        }
        console.print(f"{name}: held out {bits:.4f} bits/byte, indexer {divergence:.4f}")
        metadata = provenance(options, corpus, done)
        save_params(options.out, params, metadata)
        if options.state:
            save_params(options.state, params, metadata, dtype=jnp.float32)


if __name__ == "__main__":
    main()
