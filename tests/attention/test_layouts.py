"""Every layout is read as the bf16 rows that it dequantises to, bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jmla.attention import dense_decode, sparse_decode, sparse_prefill
from jmla.layouts import BF16Rows, KVLayout, Rows, quantize
from tests.attention.cases import SCALE, random_indices, random_queries, random_rows, same_bits

FORMATS = [
    (KVLayout.BF16, {}),
    (KVLayout.FP8_NOPE_FP8_ROPE, {}),
    (KVLayout.FP8_NOPE_FP8_ROPE, {"scale": 0.0173}),
    (KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, {"scale_format": "pow2"}),
    (KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, {"scale_format": "fp32"}),
    (KVLayout.FP4, {}),
    (KVLayout.FP8_V4, {}),
]


def rows_of(layout: KVLayout, options: dict[str, Any]) -> Rows:
    if "scale" in options:
        options = {"scale": jnp.float32(options["scale"])}
    latents = random_rows(0, 12, 16).latents
    return quantize(latents, layout, rank=128, rope_dim=64, **options)


def as_bf16(rows: Rows) -> BF16Rows:
    rope_dim = rows.width - rows.value_dim
    return BF16Rows(rows.dequantize(), rank=rows.value_dim, rope_dim=rope_dim)


@jax.jit
def every_op(rows: Rows):
    """Fewer reads than slots, and more: then the XLA path dequantises all of them at once."""
    q = random_queries(1, 2, 1, 3)
    few, many = (random_indices(2, 2, 1, topk, slots=192) for topk in (40, 300))
    table, seq_lens = jnp.array([[7, 2], [0, -1]], jnp.int32), jnp.array([30, 9], jnp.int32)
    return (
        sparse_decode(q, rows, few, sm_scale=SCALE),
        sparse_decode(q, rows, many, sm_scale=SCALE),
        sparse_prefill(q[:, 0], rows, few[:, 0], sm_scale=SCALE),
        dense_decode(q, rows, table, seq_lens, sm_scale=SCALE),
        sparse_decode(q, rows, few, sm_scale=SCALE, implementation="reference"),
    )


@pytest.mark.parametrize(("layout", "options"), FORMATS)
def test_rows_are_read_as_their_bf16_rows(layout: KVLayout, options: dict[str, Any]):
    rows = rows_of(layout, options)
    same_bits(every_op(rows), every_op(as_bf16(rows)))


def test_a_second_cache_may_have_another_layout():
    latents = random_rows(0, 192).latents
    rows = quantize(latents, KVLayout.BF16, rank=128)
    extra = quantize(latents, KVLayout.FP4, rank=128).reshape(96, 2)
    q, indices = random_queries(1, 2, 1, 3), random_indices(2, 2, 1, 20, slots=192)
    ours, wanted = (
        sparse_decode(q, rows, indices, sm_scale=SCALE, extra_rows=second, extra_indices=indices)
        for second in (extra, as_bf16(extra))
    )
    same_bits(ours, wanted)
