"""What the cases of the cache benchmark do: their inputs, and calls that rotate them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from benchmarks.inputs import LAYOUTS
from benchmarks.timing import Call
from jmla import RawLatents, move_pages
from jmla.cache import Cache, append, init_cache
from jmla.layouts import (
    IndexKeyRows,
    KVLayout,
    Rows,
    convert,
    dequantize,
    from_bytes,
    paged_index_keys,
    quantize,
    to_bytes,
)

MANY = 1 << 20
CACHE = 1 << 19  # slots of a cache that tokens are appended to
INDEX_DIM = 128
PAGE = 64
_VARIANTS = 4  # of slots and latents, that rotate
_FEW = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: quantize (from bf16), dequantize (to bf16), requantize (576 to 656 bytes, codes kept),
            convert (656 to 576 bytes), append (with index keys), append_raw (normalised and
            rotated on the way), append_packed (into the bytes of another engine, with index keys in
            pages of 8448 bytes), gather (random slots to bf16), pages (those of a page table to
            bf16; one entry in eight is -1), move (random pages from another cache), move_within,
            move_out or move_in (to or from host memory).
        layout: of the cache, as results name it.
        n: tokens.
        options: of the layout.
        prompt: whether tokens are appended to whole pages in order, and not to random slots.
    """

    op: str
    layout: str
    n: int
    options: tuple[tuple[str, Any], ...] = ()
    prompt: bool = False

    @property
    def name(self) -> str:
        """As the results have it."""
        words = [f"layout={self.layout}", f"n={self.n}"]
        words += [f"{key}={value}" for key, value in self.options]
        return " ".join(words + ["prompt"] * self.prompt)

    @property
    def kv_layout(self) -> KVLayout:
        """Of the cache."""
        return LAYOUTS[self.layout]


class Work(NamedTuple):
    """What a case does.

    Attributes:
        calls: endless; each starts the op.
        bytes: that it reads and writes.
        slots: lists of random slots that it reads, or none.
        link: which way they cross the link to the host's memory, "out" or "in"; None is not at all.
    """

    calls: Iterator[Call]
    bytes: int
    slots: Sequence[Array] = ()
    link: str | None = None


def prepare(case: Case, implementation: str, scale: int = 1) -> Work:
    """The inputs of a case, so many times fewer tokens, and its calls."""
    n = max(case.n // scale, 1)
    how: Any = {"implementation": implementation}
    if case.op.startswith("append"):
        return _append(case, n, max(CACHE // scale, n), how)
    if case.op.startswith("move"):
        return _move(case, max(n // PAGE, 1), how)
    if case.op == "gather":
        return _gather(case, n, MANY // scale, how)
    layout, options = case.kv_layout, dict(case.options)
    width, row_bytes = layout.default_rank + 64, layout.bytes_per_token()
    source: Any
    run: Callable[..., Any]
    if case.op == "quantize":
        source, size = latents(n, width), 2 * width + row_bytes
        run = functools.partial(quantize, layout=layout, **options, **how)
    elif case.op == "dequantize":
        source, size = _rows(n, layout), 2 * width + row_bytes
        run = functools.partial(dequantize, **how)
    elif case.op == "pages":
        return _pages(case, n, how)
    else:
        block, plain = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, KVLayout.FP8_NOPE_FP8_ROPE
        target = block if layout is plain else plain
        source, size = _rows(n, layout), row_bytes + target.bytes_per_token()
        run = functools.partial(convert, layout=target, **options, **how)
    call = functools.partial(jax.jit(run), source)
    return Work(itertools.repeat(call), n * size)


def _gather(case: Case, n: int, pool: int, how: Any) -> Work:
    layout = case.kv_layout
    rows, lists = _rows(pool, layout), gathered_slots(n, pool)
    read = jax.jit(lambda rows, slots: dequantize(rows, slots=slots, **how))
    calls = itertools.cycle([functools.partial(read, rows, slots) for slots in lists])
    size = 2 * (layout.default_rank + 64) + layout.bytes_per_token()
    return Work(calls, n * size, lists)


def gathered_slots(n: int, pool: int) -> list[Array]:
    """Lists of random slots of a pool."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(0, pool, n), jnp.int32) for _ in range(_VARIANTS)]


def _pages(case: Case, n: int, how: Any) -> Work:
    layout, pages = case.kv_layout, max(n // PAGE, 1)
    rows = _rows(pages * PAGE, layout).reshape(pages, PAGE)
    chosen = np.random.default_rng(0).permutation(pages)
    table = jnp.asarray(np.where(np.arange(pages) % 8 == 7, -1, chosen), jnp.int32)
    used = (pages - pages // 8) * PAGE * layout.bytes_per_token()
    read = jax.jit(lambda rows, table: dequantize(rows, pages=table, **how))
    size = used + pages * PAGE * 2 * (layout.default_rank + 64)
    return Work(itertools.repeat(functools.partial(read, rows, table)), size)


def _append(case: Case, n: int, slots: int, how: Any) -> Work:
    cache = init_cache(case.kv_layout, num_pages=-(-slots // PAGE), index_dim=INDEX_DIM)
    width = cache.rows.width
    if case.op == "append_packed":
        cache = _packed(cache)
    size = n * (2 * (width + INDEX_DIM) + cache.bytes_per_token + 4)
    new: Any = [latents(n, width)] * _VARIANTS
    if case.op == "append_raw":
        size += n * 4 * 64
        new = [raw_latents(n, width)] * _VARIANTS
    given = [
        (appended_slots(i, n, cache.num_pages, prompt=case.prompt), each, latents(n, INDEX_DIM))
        for i, each in enumerate(new)
    ]
    write = jax.jit(functools.partial(append, **how), donate_argnums=0)
    return Work(_updating(cache, [functools.partial(_call, write, each) for each in given]), size)


def _call(write: Callable[..., Cache], arguments: Sequence[Any], cache: Cache) -> Cache:
    return write(cache, *arguments)


def _updating(cache: Cache, updates: Sequence[Callable[[Cache], Cache]]) -> Iterator[Call]:
    """Calls that each update what the one before has left."""
    held = [cache]

    def call(update: Callable[[Cache], Cache]) -> object:
        held[0] = update(held[0])
        return held[0]

    return itertools.cycle([functools.partial(call, update) for update in updates])


def appended_slots(seed: int, n: int, num_pages: int, *, prompt: bool) -> Array:
    """Slots of new tokens: at random, or whole pages of them in a random order."""
    rng = np.random.default_rng(seed)
    if not prompt:
        return jnp.asarray(rng.permutation(num_pages * PAGE)[:n], jnp.int32)
    pages = rng.permutation(num_pages)[: -(-n // PAGE), None]
    return jnp.asarray((pages * PAGE + np.arange(PAGE)).reshape(-1)[:n], jnp.int32)


def _packed(cache: Cache) -> Cache:
    """The cache as the bytes of other engines: rows, or split pages, and pages of index keys."""
    paged: Any = {"page_size": PAGE} if cache.layout is KVLayout.FP8_V4 else {}
    rows = from_bytes(to_bytes(cache.rows), cache.layout, in_place=True, **paged)
    assert isinstance(cache.index_keys, IndexKeyRows)
    return Cache(rows, paged_index_keys(cache.index_keys.pack(), page_size=PAGE))


def _move(case: Case, pages: int, how: Any) -> Work:
    made = functools.partial(
        init_cache, case.kv_layout, num_pages=2 * pages, page_size=PAGE, index_dim=INDEX_DIM
    )
    cache, other, link = made(), None, None
    where: Any = None
    if case.op != "move_within":
        other = made()
    if case.op in ("move_out", "move_in"):
        link = case.op.removeprefix("move_")
        host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        there = jax.tree.map(lambda _: host, cache)
        if link == "out":
            cache, where = jax.device_put(cache, there), there
        else:
            other = jax.device_put(other, there)
    rng = np.random.default_rng(0)
    lists = [
        jnp.asarray(rng.permutation(2 * pages)[:pages], jnp.int32) for _ in range(2 * _VARIANTS)
    ]

    def moved(cache: Cache, source: Cache | None, *pages: Array) -> Cache:
        return move_pages(cache, *pages, source=source, **how)

    run = jax.jit(moved, donate_argnums=0, out_shardings=where)
    updates = [
        functools.partial(lambda pair, cache: run(cache, other, *pair), pair)
        for pair in zip(lists[::2], lists[1::2], strict=True)
    ]
    moved_bytes = pages * PAGE * cache.bytes_per_token
    copies = {"move": 2, "move_within": 4}.get(case.op, 1)
    return Work(_updating(cache, updates), copies * moved_bytes, link=link)


def latents(n: int, width: int) -> Array:
    """Normal bf16 values, the same each time."""
    if n > _FEW:
        return _many_latents(n, width)
    # Of many shapes: a program for each would take longer to compile than all else.
    values = np.random.default_rng(n).standard_normal((n, width), np.float32)
    return jnp.asarray(values.astype(jnp.bfloat16))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _many_latents(n: int, width: int) -> Array:
    return jax.random.normal(jax.random.key(n), (n, width), jnp.bfloat16)


def raw_latents(n: int, width: int) -> RawLatents:
    """Such values before norm and rotation."""
    angle = np.random.default_rng(1).uniform(0, 6, (n, 32)).astype(np.float32)
    cos, sin = jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle))
    gain = jnp.asarray(np.ones(width - 64, jnp.bfloat16))
    return RawLatents(latents(n, width), gain, cos, sin, eps=1e-6)


def _rows(n: int, layout: KVLayout) -> Rows:
    return quantize(latents(n, layout.default_rank + 64), layout)
