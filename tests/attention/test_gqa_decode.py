"""Grouped-query decode on any machine: XLA and the reference against f64, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import gqa_decode, quantize_key_values, zero_key_values
from jmla.attention import Implementation
from jmla.layouts import FP4KeyValues
from jmla.layouts.fp4 import FP4Rows
from tests.attention.cases import same_bits
from tests.attention.gqa_cases import (
    FORMATS,
    LENGTHS,
    Sizes,
    case,
    check,
    dequantize,
    random_key_values,
    random_queries,
)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "xla") for name in FORMATS), ("scaled fp8", "reference"), ("fp4", "reference")],
)
def test_against_f64(name: str, implementation: Implementation):
    sizes = Sizes(s_q=3, page_size=7)
    check(gqa_decode, name, LENGTHS, sizes, rounded=True, implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_tokens_that_see_each_other(implementation: Implementation):
    sizes = Sizes(4, 1, 32, 2, 64)
    check(gqa_decode, "fp4", LENGTHS, sizes, causal=False, implementation=implementation)


def test_more_keys_than_a_step_has_and_parts():
    check(gqa_decode, "fp4", [2100, 5], Sizes(), implementation="xla", num_splits=3)


def test_a_request_alone_has_the_bits_it_has_in_a_batch():
    q, rows, paging = case("bf16", [5, 130, 0, 64], Sizes())
    table, lengths = jnp.asarray(paging.table), jnp.array([5, 130, 0, 64], jnp.int32)

    def decode(part: slice) -> tuple[jax.Array, jax.Array]:
        return gqa_decode(
            q[part], rows, table[part], lengths[part], sm_scale=0.1, implementation="xla"
        )

    together = decode(slice(None))
    for i in range(4):
        alone = decode(slice(i, i + 1))
        same_bits(alone, jax.tree.map(lambda x, i=i: x[i : i + 1], together))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_lengths_that_no_table_holds(implementation: Implementation):
    rows, q = random_key_values(1, "bf16", (5, 4), Sizes()), random_queries(0, 3, Sizes())
    table = jnp.array([[3, 1], [3, 1], [2**31 - 1, -(2**31)]], jnp.int32)
    out, lse = gqa_decode(
        q,
        rows,
        table,
        jnp.array([-(2**31), 100, 8], jnp.int32),
        sm_scale=0.1,
        implementation=implementation,
    )
    for i in (0, 2):
        assert not np.asarray(out[i]).any() and np.isneginf(np.asarray(lse[i])).all()
    short = gqa_decode(
        q[1:2], rows, table[1:2], jnp.array([8], jnp.int32), sm_scale=0.1, implementation="xla"
    )
    np.testing.assert_allclose(np.asarray(lse[1:2]), np.asarray(short[1]), rtol=1e-6)


def test_a_token_has_the_bytes_of_the_engines_pools():
    """`[slots, heads, dim / 2]` and `[slots, heads * dim / 16]`, by the rule of FP4 latents."""
    keys, values = (
        jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(size=(2, 6, 4, 128))
    )
    rows = jax.jit(quantize_key_values, static_argnums=2)(keys, values, "fp4_e2m1")
    assert isinstance(rows, FP4KeyValues)
    latents = FP4Rows.zeros((0,), rank=512, rope_dim=0)
    for ours, scales, x in (
        (rows.keys, rows.key_scales, keys),
        (rows.values, rows.value_scales, values),
    ):
        row = jax.jit(latents.encode)(x.reshape(6, 512))
        np.testing.assert_array_equal(ours.reshape(6, 256), row.packed)
        np.testing.assert_array_equal(scales, row.exponents)
    sizes = {
        name: zero_key_values(FORMATS[name][0], (0,), kv_heads=4, head_dim=128) for name in FORMATS
    }
    assert {name: rows.bytes_per_token for name, rows in sizes.items()} == {
        "bf16": 2048,
        "fp8": 1024,
        "scaled fp8": 1024,
        "fp4": 576,
    }


@pytest.mark.parametrize("name", ["scaled fp8", "fp4"])
def test_rows_are_appended_by_slot(name: str):
    dtype, scales = FORMATS[name]
    new = random_key_values(1, name, (3,), Sizes())
    rows = zero_key_values(dtype, (2, 4), kv_heads=2, head_dim=128, **scales)
    rows = jax.jit(lambda rows, new: rows.set(jnp.array([5, -1, 2], jnp.int32), new))(rows, new)
    keys, _ = dequantize(rows.flat())
    wanted, _ = dequantize(new)
    np.testing.assert_array_equal(keys[jnp.array([5, 2])], wanted[jnp.array([0, 2])])
    assert not np.asarray(keys[jnp.array([0, 1, 3, 4, 6, 7])]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 1, 5, 128), jnp.bfloat16)}, "multiple of rows.kv_heads=2"),
        ({"q": jnp.zeros((2, 1, 6, 64), jnp.bfloat16)}, r"\[batch, s_q, heads, 128\]"),
        ({"q": jnp.zeros((2, 1, 6, 128))}, "expected bfloat16"),
        ({"rows": jnp.zeros(3)}, "quantize_key_values"),
        ({"page_table": jnp.zeros((3, 2), jnp.int32)}, "page_table.shape"),
        ({"seq_lens": jnp.zeros(2)}, "expected int32"),
        ({"num_splits": 0}, "num_splits=0"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
    ],
)
def test_wrong_arguments(changes, message: str):
    rows = random_key_values(1, "bf16", (5, 4), Sizes())
    arguments = {
        "q": random_queries(0, 2, Sizes()),
        "rows": rows,
        "page_table": jnp.zeros((2, 2), jnp.int32),
        "seq_lens": jnp.zeros(2, jnp.int32),
        "sm_scale": 0.1,
    } | changes
    q, rows, table, lengths = (
        arguments.pop(name) for name in ("q", "rows", "page_table", "seq_lens")
    )
    with pytest.raises(ValueError, match=message):
        gqa_decode(q, rows, table, lengths, **arguments)


def test_sizes_that_no_cache_has():
    with pytest.raises(ValueError, match="multiple of 16"):
        zero_key_values("fp4_e2m1", (1,), kv_heads=2, head_dim=24)
    with pytest.raises(ValueError, match="'bfloat16', 'fp8_e4m3', 'fp4_e2m1'"):
        zero_key_values("int8", (1,), kv_heads=2, head_dim=24)
    with pytest.raises(ValueError, match="has no scale for all"):
        zero_key_values("bfloat16", (1,), kv_heads=2, head_dim=24, key_scale=1.0)


def test_the_kernel_says_what_it_does_not_serve():
    sizes = Sizes(head_dim=32)
    rows = random_key_values(1, "bf16", (5, 4), sizes)
    with pytest.raises(
        NotImplementedError, match="heads of 64 or 128 values only, and head_dim=32"
    ):
        gqa_decode(
            random_queries(0, 2, sizes),
            rows,
            jnp.zeros((2, 2), jnp.int32),
            jnp.zeros(2, jnp.int32),
            sm_scale=0.1,
            implementation="mosaic_gpu",
        )
