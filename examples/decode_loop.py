"""Prefill real text and generate on from it with a jit-compiled decode loop.

python -m examples.decode_loop
python -m examples.decode_loop --layout 576 --prefill-backend flashmla_kv --decode-backend trtllm
python -m examples.decode_loop --layout fp4 --prefill-backend flashmla --decode-backend flashmla
python -m examples.decode_loop --prompt-file some_module.py --tokens 400
python -m examples.decode_loop --hisparse
python -m examples.decode_loop --compare
"""

import argparse
import codecs
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.accuracy import compare
from examples.byte_lm import END_OF_DOCUMENT, ByteLMConfig, Params, load_params
from examples.generation import (
    DecodeState,
    compile_programs,
    move_to_host,
    new_caches,
    new_host_caches,
)
from jmla import Config, HiSparseConfig, KVLayout, Plan, resolve
from jmla.hisparse import HiSparseState

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights" / "byte_lm.safetensors"
PROMPT = HERE / "prompts" / "ring_buffer.txt"
LAYOUTS = {
    "bf16": KVLayout.BF16,
    "576": KVLayout.FP8_NOPE_FP8_ROPE,
    "656": KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE,
    "fp4": KVLayout.FP4,
    "584": KVLayout.FP8_V4,
}
# Bytes per call of the prefill and of the decode loop; text appears after each of the latter.
PREFILL_CHUNK = 512
DECODE_CHUNK = 32
PROGRESS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total}"),
    TimeElapsedColumn(),
)


@dataclass(frozen=True)
class Timing:
    """Seconds and counts of one generation; compilation is apart.

    Attributes:
        compile_s: both programs.
        first_token_s: from the prompt to the first new byte.
        decode_s: all calls of the decode loop.
        steps: how many bytes these made, those past the last one asked for included.
    """

    compile_s: float
    first_token_s: float
    decode_s: float
    steps: int

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first byte."""
        return self.steps / self.decode_s if self.steps else math.nan


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layout",
        type=str.lower,
        choices=LAYOUTS,
        help="how the cache stores a token (default: the plan's choice)",
    )
    parser.add_argument(
        "--prefill-backend", help="contract of the prefill path (default: the plan's choice)"
    )
    parser.add_argument(
        "--decode-backend", help="contract of the decode path (default: the plan's choice)"
    )
    parser.add_argument(
        "--heads-per-device",
        type=int,
        default=16,
        help="attend in groups of this many heads (default: all 16)",
    )
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument(
        "--hisparse",
        action="store_true",
        help="decode from a cache in host memory with a small buffer on the device",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=4096,
        help="bytes that the cache has room for (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-file",
        help="text to go on from; - is standard input (default: a file of the repository)",
    )
    parser.add_argument(
        "--tokens", type=int, default=256, help="bytes to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="0 takes the likeliest byte (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="measure the accuracy of every layout and backend pair instead",
    )
    parser.add_argument(
        "--windows",
        type=int,
        help="--compare: held-out windows (default: 16 on a GPU, 1 elsewhere)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="--compare: folder for table and plot"
    )
    return parser.parse_args(arguments)


def read_prompt(name: str | None, *, room: int) -> bytes:
    """The prompt's bytes: a file, standard input for "-", or the default text.

    Raises:
        FileNotFoundError, IsADirectoryError: nothing to read there.
        ValueError: empty, not UTF-8, or longer than `room` bytes.
    """
    source = name or str(PROMPT)
    if source == "-":
        source, prompt = "standard input", sys.stdin.buffer.read()
    else:
        prompt = Path(source).read_bytes()
    if not prompt:
        raise ValueError(f"{source}: the prompt is empty; give at least one byte of text.")
    try:
        prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error}); convert it first.") from error
    if END_OF_DOCUMENT in prompt:
        raise ValueError(f"{source}: holds a zero byte, which ends a document here; give text.")
    if len(prompt) > room:
        raise ValueError(
            f"{source}: {len(prompt)} bytes of prompt, room for {room}; raise --context, ask for "
            "fewer --tokens, or give a shorter text."
        )
    return prompt


def make_plan(options: argparse.Namespace, config: ByteLMConfig) -> Plan:
    """The plan of the command line's choices."""
    return resolve(
        Config(
            num_heads=options.heads_per_device,
            sm_scale=config.mla.sm_scale,
            layout=LAYOUTS[options.layout] if options.layout else None,
            prefill_backend=options.prefill_backend,
            decode_backend=options.decode_backend,
            page_size=options.page_size,
            index_topk=config.mla.index_topk,
            kv_lora_rank=config.mla.kv_lora_rank,
            rope_dim=config.mla.qk_rope_head_dim,
            index_head_dim=config.mla.index_head_dim,
            hisparse=HiSparseConfig() if options.hisparse else None,
        )
    )


def check_sizes(options: argparse.Namespace, config: ByteLMConfig) -> None:
    """ValueError for numbers that cannot work together."""
    if options.tokens < 1:
        raise ValueError(f"{options.tokens=}: expected at least 1.")
    if not options.tokens < options.context <= config.max_context:
        raise ValueError(
            f"{options.context=}: expected more than --tokens ({options.tokens}) and at most "
            f"{config.max_context}, what the model was trained for."
        )
    heads = config.mla.num_heads
    if options.heads_per_device < 1 or heads % options.heads_per_device:
        raise ValueError(
            f"{options.heads_per_device=}: expected a divisor of the model's {heads} heads."
        )
    if not (options.temperature >= 0 and math.isfinite(options.temperature)):
        raise ValueError(f"{options.temperature=}: expected a finite number, 0 or more.")


def generate(
    params: Params,
    config: ByteLMConfig,
    plan: Plan,
    prompt: bytes,
    *,
    context: int,
    tokens: int,
    temperature: float,
    seed: int,
    console: Console,
    progress_console: Console,
) -> tuple[bytes, Timing]:
    """Write the continuation of `prompt` to `console` as it comes; returns it and the timing.

    Ends after `tokens` bytes, or where the model ends the document.
    """
    calls = -(-(tokens - 1) // DECODE_CHUNK)
    room = max(context, len(prompt) + calls * DECODE_CHUNK)
    caches, page_table = new_caches(plan, config, requests=1, context=room)
    host_caches: tuple[HiSparseState, ...] = ()
    decode_table = page_table
    if plan.config.hisparse is not None:
        host_caches, decode_table = new_host_caches(plan, config, context=room)
    key, first_key = jax.random.split(jax.random.key(seed))
    zero = jnp.zeros((1,), jnp.int32)
    heat = jnp.float32(temperature)
    padded = np.zeros(-(-len(prompt) // PREFILL_CHUNK) * PREFILL_CHUNK, np.int32)
    padded[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    with Progress(*PROGRESS, console=progress_console, transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        start = time.perf_counter()
        programs = compile_programs(
            params,
            config,
            plan,
            caches,
            page_table,
            DecodeState(host_caches or caches, zero, zero, key),
            decode_table,
            chunk=PREFILL_CHUNK,
            steps=DECODE_CHUNK,
        )
        compile_s = time.perf_counter() - start
        progress.update(task, total=1, completed=1)

        task = progress.add_task("prefill, bytes", total=len(prompt))
        start = time.perf_counter()
        for stored in range(0, len(prompt), PREFILL_CHUNK):
            count = zero + min(PREFILL_CHUNK, len(prompt) - stored)
            chunk = jnp.asarray(padded[stored : stored + PREFILL_CHUNK])
            caches, logits = programs.prefill(
                params, caches, page_table, zero + stored, count, chunk
            )
            progress.advance(task, int(count[0]))
        token = programs.first(logits, count, first_key, heat)
        generated = np.asarray(token, np.uint8).tobytes()
        first_token_s = time.perf_counter() - start

    text = codecs.getincrementaldecoder("utf-8")("replace")
    show = partial(console.print, end="", markup=False, highlight=False, soft_wrap=True)
    end = bytes([END_OF_DOCUMENT])
    show(text.decode(generated.removesuffix(end)))
    if host_caches:
        host_caches = move_to_host(host_caches, caches, page_table, zero + len(prompt))
    state = DecodeState(host_caches or caches, zero + len(prompt), token, key)
    steps, start = 0, time.perf_counter()
    while len(generated) < tokens and end not in generated:
        state, new = programs.decode(params, state, decode_table, heat)
        steps += DECODE_CHUNK
        piece = np.asarray(new[:, 0], np.uint8).tobytes()[: tokens - len(generated)]
        generated += piece
        show(text.decode(piece.partition(end)[0]))
    decode_s = time.perf_counter() - start
    show(text.decode(b"", final=True) + "\n")
    return generated, Timing(compile_s, first_token_s, decode_s, steps)


def run(options: argparse.Namespace) -> None:
    """What `main` does, errors not yet made readable."""
    config = ByteLMConfig()
    check_sizes(options, config)
    # XLA's CPU has no fast bf16 product.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    console, progress_console = Console(), Console(stderr=True)
    params, metadata = load_params(options.weights, config, dtype=dtype)
    if options.compare:
        compare(params, config, windows=options.windows, folder=options.out, console=console)
        return
    prompt = read_prompt(options.prompt_file, room=options.context - options.tokens)
    plan = make_plan(options, config)
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    console.print(
        f"\nmodel: {millions:.2f} M parameters, trained on "
        f"{int(metadata.get('bytes', 0)) / 1e6:.1f} MB of Python's standard library",
        f"\ndevice: {jax.devices()[0].device_kind}; prompt: {len(prompt)} bytes, ending in\n",
        highlight=False,
    )
    tail = prompt.decode("utf-8").splitlines(keepends=True)[-5:]
    console.print("".join(tail), end="", style="dim", markup=False, highlight=False, soft_wrap=True)
    _, timing = generate(
        params,
        config,
        plan,
        prompt,
        context=options.context,
        tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
        console=console,
        progress_console=progress_console,
    )
    per_layer = plan.init_cache(1).bytes_per_token
    console.print(
        f"\ntime to first token: {timing.first_token_s * 1e3:.1f} ms for {len(prompt)} bytes "
        f"(compilation before that: {timing.compile_s:.1f} s)\n"
        f"decode: {timing.tokens_per_s:.1f} tokens/s over {timing.steps} tokens, "
        f"{DECODE_CHUNK} a call, one compilation\n"
        f"cache: {per_layer} bytes per token and layer, {per_layer * config.layers} per token",
        highlight=False,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0, or 2 after one line about what was wrong with the input."""
    options = parse_arguments(arguments)
    try:
        run(options)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"decode_loop: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
