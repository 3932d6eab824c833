"""Bits per byte on held-out text for every layout and backend pair, with ceiling and floors."""

import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.byte_lm import ByteLMConfig, Params
from examples.corpus import HELD_OUT, held_out_windows
from examples.generation import Chooser, extend, new_caches, prefill_chunk
from jmla import Cache, Config, KVLayout, Plan, resolve, valid_pairs

# Each scored byte has at least this many bytes of context.
PROMPT = 4096
CHUNK = 512
# Bytes scored in each window: on a GPU, elsewhere.
SCORED = (1024, 256)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: layout, or what is attended to instead of the indexer's choice.
        prefill: backend.
        decode: backend.
        bytes_per_token: of one layer's cache, index keys included.
        prefill_bits: bits per byte of the scored bytes when they are prefilled.
        decode_bits: the same when they are decoded one by one after a prefilled prompt.
    """

    name: str
    prefill: str
    decode: str
    bytes_per_token: int
    prefill_bits: float
    decode_bits: float


@dataclass(frozen=True)
class Case:
    """One cell to measure."""

    name: str
    plan: Plan
    chooser: Chooser


def cases(config: ByteLMConfig, *, page_size: int = 64) -> Iterator[Case]:
    """Ceiling, every layout with every sparse pair that can read it, floors."""
    base = Config(
        num_heads=config.mla.num_heads,
        sm_scale=config.mla.sm_scale,
        layout=KVLayout.BF16,
        page_size=page_size,
        index_topk=config.mla.index_topk,
        kv_lora_rank=config.mla.kv_lora_rank,
        rope_dim=config.mla.qk_rope_head_dim,
        index_head_dim=config.mla.index_head_dim,
    )
    dense = replace(base, prefill_backend="flashmla", decode_backend="flashmla")
    yield Case("dense attention", resolve(dense), "indexer")
    for layout in KVLayout:
        for prefill, decode in valid_pairs(replace(base, layout=layout)):
            if "flashmla" in (prefill, decode) or prefill == "flashmla_auto":
                continue  # dense, or another name for a pair that is here
            pair = replace(base, layout=layout, prefill_backend=prefill, decode_backend=decode)
            yield Case(layout.name, resolve(pair), "indexer")
    yield Case(f"last {config.mla.index_topk} bytes", resolve(base), "last")
    yield Case(f"random {config.mla.index_topk} bytes", resolve(base), "random")


def compare(
    params: Params,
    config: ByteLMConfig,
    *,
    windows: int | None,
    folder: Path,
    console: Console,
) -> list[Row]:
    """Measure every case; print the table, and write it with a plot and its numbers to `folder`.

    Args:
        params: the trained model.
        config: its sizes.
        windows: held-out windows to score; None takes 16 on a GPU and 1 elsewhere.
        folder: gets `accuracy.md`, `accuracy.json` and `accuracy.png`.
        console: where table and progress go.
    """
    on_gpu = jax.default_backend() == "gpu"
    count = windows or (16 if on_gpu else 1)
    scored = SCORED[0 if on_gpu else 1]
    text = jnp.asarray(held_out_windows(PROMPT + scored + 1, count)).astype(jnp.int32)
    everything = list(cases(config))
    rows = []
    # A prefill reads no decode setting, so one result serves every decode backend beside it.
    prefilled: dict[tuple, tuple[tuple[Cache, ...], Array, float]] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("bits per byte", total=len(everything))
        for case in everything:
            plan = case.plan
            progress.update(task, description=f"{case.name} {plan.prefill.backend}")
            key = (case.name, plan.layout, plan.prefill.backend)
            if key not in prefilled:
                prefilled = {key: _prefill_bits(params, config, case, text)}
            caches, page_table, prefill_bits = prefilled[key]
            nats = _decode_nats(
                params,
                caches,
                page_table,
                text[:, PROMPT:],
                config=config,
                plan=plan,
                chooser=case.chooser,
            )
            rows.append(
                Row(
                    case.name,
                    plan.prefill.backend,
                    plan.decode.backend,
                    caches[0].bytes_per_token,
                    prefill_bits,
                    float(nats) / math.log(2),
                )
            )
            progress.advance(task)
    _report(rows, count, scored, folder, console)
    return rows


def _prefill_bits(
    params: Params, config: ByteLMConfig, case: Case, text: Int[Array, "w t"]
) -> tuple[tuple[Cache, ...], Int[Array, "w pages"], float]:
    """Prefill each window as a request: caches, page table, bits of what follows the prompt."""
    windows, length = text.shape[0], text.shape[1] - 1
    caches, page_table = new_caches(case.plan, config, requests=windows, context=length)
    nats = []
    for window in range(windows):
        for start in range(0, length, CHUNK):
            chunk = text[window, start : start + CHUNK + 1]
            count = chunk.shape[0] - 1
            caches, logits = prefill_chunk(
                params,
                caches,
                page_table[window : window + 1],
                jnp.full((1,), start, jnp.int32),
                jnp.full((1,), count, jnp.int32),
                jnp.pad(chunk[:-1], (0, CHUNK - count)),
                config=config,
                plan=case.plan,
                chooser=case.chooser,
            )
            if start + count > PROMPT:
                skipped = max(PROMPT - start, 0)
                nats.append(_nats(logits[skipped:count], chunk[1 + skipped :]))
    return caches, page_table, float(jnp.mean(jnp.concatenate(nats))) / math.log(2)


@partial(jax.jit, static_argnames=("config", "plan", "chooser"))
def _decode_nats(
    params: Params,
    caches: tuple[Cache, ...],
    page_table: Int[Array, "w pages"],
    scored: Int[Array, "w t"],
    *,
    config: ByteLMConfig,
    plan: Plan,
    chooser: Chooser,
) -> Float[Array, ""]:
    """Mean nats of the bytes after the prompt, each decoded after the true ones before it."""

    def step(carry, pair):
        caches, stored = carry
        given, following = pair
        caches, logits = extend(
            params,
            caches,
            page_table,
            stored,
            jnp.ones_like(stored),
            given,
            config=config,
            plan=plan,
            phase="decode",
            chooser=chooser,
        )
        return (caches, stored + 1), _nats(logits, following)

    stored = jnp.full((scored.shape[0],), PROMPT, jnp.int32)
    _, nats = jax.lax.scan(step, (caches, stored), (scored[:, :-1].T, scored[:, 1:].T))
    return jnp.mean(nats)


def _nats(logits: Float[Array, "t v"], following: Int[Array, " t"]) -> Float[Array, " t"]:
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_probabilities, following[:, None], axis=1)[:, 0]


def _report(rows: list[Row], windows: int, scored: int, folder: Path, console: Console) -> None:
    title = (
        f"bits per byte of {windows} x {scored} held-out bytes, each after at least {PROMPT} others"
    )
    reference = next(row for row in rows if row.name == KVLayout.BF16.name)
    lines = [
        (
            row.name,
            row.prefill,
            row.decode,
            str(row.bytes_per_token),
            f"{row.prefill_bits:.4f}",
            f"{row.decode_bits:.4f}",
            f"{(row.decode_bits / reference.decode_bits - 1) * 100:+.2f} %",
        )
        for row in rows
    ]
    header = ("cache or selection", "prefill", "decode", "bytes", "prefilled", "decoded", "to BF16")
    table = Table(title=title)
    for name in header:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    folder.mkdir(parents=True, exist_ok=True)
    environment = (
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, held-out modules of Python "
        f"{platform.python_version()}: {', '.join(HELD_OUT)}"
    )
    numbers = {"title": title, "environment": environment, "rows": [asdict(row) for row in rows]}
    (folder / "accuracy.json").write_text(json.dumps(numbers, indent=1) + "\n")
    markdown = [
        "# Accuracy",
        "",
        f"{title[0].upper()}{title[1:]}.",
        "",
        "*Bytes* are one layer's cache bytes per token, index keys included; *prefilled* scores "
        "the text through the prefill backend, *decoded* byte by byte through the decode backend. "
        "Dense attention is the ceiling; pairs of which one half is dense are left out, and so is "
        "`flashmla_auto`, another name for a pair that is here.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        "![bits per byte of every cache and selection](accuracy.png)",
        "",
        f"{environment}. Made by "
        f"`python -m examples.decode_loop --compare --windows {windows} --out docs/accuracy`.",
    ]
    (folder / "accuracy.md").write_text("\n".join(markdown) + "\n")
    _plot(rows, title, folder / "accuracy.png")
    console.print(f"written: {folder / 'accuracy.md'}, accuracy.json, accuracy.png")


def _plot(rows: list[Row], title: str, path: Path) -> None:
    # Half a second of import that only a comparison needs.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.2), layout="constrained")
    labels = [f"{row.name}\n{row.prefill} / {row.decode}" for row in rows]
    layouts = {layout.name for layout in KVLayout}
    colors = ["tab:blue" if row.name in layouts else "tab:gray" for row in rows]
    bars = axes.barh(labels, [row.decode_bits for row in rows], color=colors)
    axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.margins(x=0.1)
    axes.set_xlabel("bits per byte, decoded; less is better")
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
