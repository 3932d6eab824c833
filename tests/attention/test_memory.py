"""The XLA implementation's memory does not grow with the number of queries."""

import jax
import jax.numpy as jnp
import pytest

from jmla._xla_attention import DECODE_ROWS_PER_STEP, MAX_GATHERED_ROWS
from jmla.attention import sparse_decode, sparse_prefill
from jmla.layouts import BF16Rows

MIB = 1 << 20


def shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def rows(slots: int) -> BF16Rows:
    return BF16Rows(shaped(slots, 576), rank=512, rope_dim=64)  # type: ignore[arg-type]


def temp_bytes(op, *args) -> int:
    compiled = jax.jit(lambda *args: op(*args, sm_scale=0.1)).lower(*args).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("heads", [16, 128])
def test_prefill_of_4096_queries_to_2048_keys(heads: int):
    """Gathering all keys at once would take 9 GiB."""
    used = [
        temp_bytes(
            sparse_prefill,
            shaped(tokens, heads, 576),
            rows(1 << 16),
            shaped(tokens, 2048, dtype=jnp.int32),
        )
        for tokens in (1024, 4096)
    ]
    gathered = MAX_GATHERED_ROWS * 576 * 2
    assert gathered == 36 * MIB
    assert max(used) < gathered + 16 * MIB
    assert abs(used[0] - used[1]) < MIB


def test_decode_to_a_million_keys():
    used = temp_bytes(
        sparse_decode,
        shaped(8, 1, 16, 576),
        rows(1 << 20),
        shaped(8, 1, 1 << 20, dtype=jnp.int32),
    )
    # Off the CPU the eight lists of slots are padded to a step of sixteen rows.
    lists = 0 if jax.default_backend() == "cpu" else DECODE_ROWS_PER_STEP * (1 << 20) * 4
    assert used < 48 * MIB + lists


@pytest.mark.parametrize("heads", [16, 128])
def test_derivatives_of_prefill(heads: int):
    """Keeping what every query gathered and weighed would take 20 GiB for 4096 of 128 heads."""

    def loss(q, rows, indices, sm_scale):
        out, _, lse = sparse_prefill(q, rows, indices, sm_scale=sm_scale)
        return out.astype(jnp.float32).sum() + lse.sum()

    def gradient(*args, sm_scale):
        return jax.grad(loss, argnums=(0, 1))(*args, sm_scale)

    used = []
    for tokens in (512, 1024):
        shapes = [shaped(tokens, heads, 576), rows(1 << 14)]
        used.append(temp_bytes(gradient, *shapes, shaped(tokens, 2048, dtype=jnp.int32)))
    # The cotangent of out in f32 and copies of the queries in whole steps grow with them.
    queries = 512 * heads * 576 * 2
    assert max(used) < 560 * MIB
    assert used[1] - used[0] < 4 * queries + 8 * MIB
