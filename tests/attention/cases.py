"""Inputs of the attention tests: golden files, and random caches with NaN where none may look."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmla.layouts import BF16Rows, KVLayout, Rows, from_bytes
from tests.helpers import bf16, golden

DECODE_FILES = tuple(f"sparse_decode_{i}" for i in range(6))
PREFILL_FILES = tuple(f"sparse_prefill_{i}" for i in range(3))

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
SCALE = 0.6  # logits of a standard deviation of about 1, with the rows below


class GoldenCase(NamedTuple):
    """The positional and keyword arguments of an op, and what it must return."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: dict[str, np.ndarray]


def golden_decode(name: str) -> GoldenCase:
    data = golden(name)
    kwargs: dict[str, Any] = {"sm_scale": float(data["sm_scale"])}
    for key in ("attn_sink", "topk_length", "extra_indices", "extra_topk_length"):
        if key in data:
            kwargs[key] = jnp.asarray(data[key])
    if "extra_packed" in data:
        kwargs["extra_rows"] = _golden_rows(data["extra_packed"], int(data["extra_block_size"]))
    rows = _golden_rows(data["packed"], int(data["block_size"]))
    lse = data["lse"].swapaxes(1, 2)  # [b, h, s_q] there
    return GoldenCase(
        (bf16(data["q_bf16"]), rows, jnp.asarray(data["indices"])),
        kwargs,
        {"out": np.asarray(bf16(data["out_bf16"])), "lse": _empty_is_negative(lse)},
    )


def golden_prefill(name: str) -> GoldenCase:
    data = golden(name)
    kwargs: dict[str, Any] = {"sm_scale": float(data["sm_scale"])}
    for key in ("attn_sink", "topk_length"):
        if key in data:
            kwargs[key] = jnp.asarray(data[key])
    latents = bf16(data["kv_bf16"])[:, 0]
    # Both widths have values of 512: at width 512 the whole row is the value.
    rows = BF16Rows(latents, rank=512, rope_dim=latents.shape[-1] - 512)
    return GoldenCase(
        (bf16(data["q_bf16"]), rows, jnp.asarray(data["indices"][:, 0])),
        kwargs,
        {
            "out": np.asarray(bf16(data["out_bf16"])),
            "max_logits": data["max_logits"],
            "lse": _empty_is_negative(data["lse"]),
        },
    )


def _golden_rows(packed: np.ndarray, page_size: int) -> Rows:
    if packed.ndim == 2:
        return from_bytes(jnp.asarray(packed), KVLayout.FP8_V4, page_size=page_size)
    layout = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
    return from_bytes(jnp.asarray(packed[:, :, 0]), layout)


def _empty_is_negative(lse: np.ndarray) -> np.ndarray:
    """The source marks a row that attends to nothing by +inf, this library by -inf."""
    return np.where(np.isposinf(lse), -np.inf, lse)


def random_rows(seed: int, *shape: int, rank: int = 128, rope_dim: int = 64) -> BF16Rows:
    latents = 0.1 * np.random.default_rng(seed).standard_normal((*shape, rank + rope_dim))
    return BF16Rows(jnp.asarray(latents.astype(jnp.bfloat16)), rank=rank, rope_dim=rope_dim)


def random_queries(seed: int, *shape: int, width: int = 192) -> jax.Array:
    q = np.random.default_rng(seed).standard_normal((*shape, width))
    return jnp.asarray(q.astype(jnp.bfloat16))


def random_indices(seed: int, *shape: int, slots: int, bad: float = 0.3) -> jax.Array:
    """Slots in range, and a fraction `bad` of every kind of index that is not."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, slots, shape)
    invalid = np.array([INT_MIN, -123456, -1, slots, slots + 1, 114514, INT_MAX])
    indices = np.where(rng.random(shape) < bad, rng.choice(invalid, shape), indices)
    return jnp.asarray(indices.astype(np.int32))


def poison(rows: BF16Rows, *named: jax.Array | np.ndarray) -> BF16Rows:
    """`rows` with NaN in every slot that none of the arrays of slots names."""
    keep = np.zeros(rows.num_slots, bool)
    for slots in named:
        flat = np.asarray(slots).ravel()
        keep[flat[(flat >= 0) & (flat < rows.num_slots)]] = True
    latents = np.array(rows.flat().latents)
    latents[~keep] = np.nan
    latents = latents.reshape(rows.latents.shape)
    return BF16Rows(jnp.asarray(latents), rank=rows.rank, rope_dim=rows.rope_dim)


def same_bits(a: object, b: object) -> None:
    """Asserts that two pytrees of arrays agree in every bit (NaN in the same places)."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype, (x.dtype, y.dtype)
        np.testing.assert_array_equal(x.astype(np.float32), y.astype(np.float32))
