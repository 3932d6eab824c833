"""Random caches, queries and index sets of the attention benchmarks."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int

from jmla import KVLayout, Rows, from_bytes, quantize, to_bytes
from jmla.layouts import ScaleFormat

IndexKind = Literal["uniform", "clustered"]
"""Independent slots, or runs of neighbours as a selection of nearby tokens gives."""

RUN = 64  # slots of a run of clustered indices

LAYOUTS = {
    "656": KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE,
    "576": KVLayout.FP8_NOPE_FP8_ROPE,
    "bf16": KVLayout.BF16,
    "fp4": KVLayout.FP4,
    "584": KVLayout.FP8_V4,
}

IN_PLACE = {"656-packed": "656", "584-pages": "584"}
"""Layouts as the bytes of other engines, which stay as they are."""

SM_SCALE = 0.1352337789  # DeepSeek-V3.2
# With latents of unit variance, logits of a standard deviation of about 1.
QUERY_STD = 0.3

_ROWS_PER_STEP = 1 << 15


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set of a case's inputs."""

    q: BFloat16[Array, "b s_q h width"]
    indices: Int[Array, "b s_q topk"]


def random_cache(
    layout: KVLayout,
    *,
    slots: int,
    page_size: int,
    scale_format: ScaleFormat = "pow2",
    seed: int = 0,
) -> Rows:
    """A cache of token shape (pages, page_size) whose latents are normal, of unit variance.

    Raises:
        ValueError: `slots` is not a number of whole pages.
    """
    if slots % page_size:
        raise ValueError(f"{slots=}: expected a multiple of {page_size=}")
    step = min(slots, _ROWS_PER_STEP)
    if slots % step:
        raise ValueError(f"{slots=}: expected a multiple of {step}")
    width = layout.default_rank + 64

    @jax.jit
    def make(keys: Array) -> Rows:
        def part(key: Array) -> Rows:
            return quantize(
                jax.random.normal(key, (step, width)), layout, scale_format=scale_format
            )

        # In parts: the latents of a whole pool take several times its memory.
        return jax.lax.map(part, keys).reshape(slots // page_size, page_size)

    return jax.block_until_ready(make(jax.random.split(jax.random.key(seed), slots // step)))


def packed_in_place(rows: Rows, scale_format: ScaleFormat | None) -> Rows:
    """The same rows as another engine's bytes, read where they are."""
    return from_bytes(
        jax.block_until_ready(to_bytes(rows)),
        rows.layout,
        scale_format=scale_format or "pow2",
        page_size=rows.shape[1] if rows.layout is KVLayout.FP8_V4 else None,
        in_place=True,
    )


def random_slots(
    rng: np.random.Generator, shape: tuple[int, ...], *, slots: int, kind: IndexKind
) -> np.ndarray:
    """int32 slots of a pool, drawn with repetition."""
    if kind == "uniform":
        return rng.integers(0, slots, shape, dtype=np.int32)
    *tokens, topk = shape
    runs = -(-topk // RUN)
    starts = rng.integers(0, max(slots // RUN, 1), (*tokens, runs, 1), dtype=np.int32) * RUN
    drawn = starts + np.arange(RUN, dtype=np.int32)
    return drawn.reshape(*tokens, runs * RUN)[..., :topk] % slots


def random_inputs(
    count: int,
    *,
    batch: int,
    s_q: int,
    heads: int,
    width: int,
    topk: int,
    slots: int,
    kind: IndexKind,
    seed: int = 1,
) -> list[Inputs]:
    """`count` sets of queries and indices, on the device."""
    rng = np.random.default_rng(seed)
    make_q = jax.jit(
        lambda key: (QUERY_STD * jax.random.normal(key, (batch, s_q, heads, width))).astype(
            jnp.bfloat16
        )
    )
    return [
        Inputs(
            make_q(key),
            jnp.asarray(random_slots(rng, (batch, s_q, topk), slots=slots, kind=kind)),
        )
        for key in jax.random.split(jax.random.key(seed), count)
    ]
