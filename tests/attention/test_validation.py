"""Contract 6: what a call cannot do is said when it is traced, with what was got and expected."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jmla.attention import dense_decode, sparse_decode, sparse_prefill
from jmla.layouts import KVLayout, quantize
from tests.attention.cases import SCALE, random_queries, random_rows

ROWS = random_rows(0, 4, 8)
Q = random_queries(1, 2, 1, 3)
INDICES = jnp.zeros((2, 1, 5), jnp.int32)
TABLE = jnp.zeros((2, 4), jnp.int32)
LENGTHS = jnp.ones(2, jnp.int32)

DECODE = {"q": Q, "rows": ROWS, "indices": INDICES, "sm_scale": SCALE}
PREFILL = {"q": Q[:, 0], "rows": ROWS, "indices": INDICES[:, 0], "sm_scale": SCALE}
DENSE = {"q": Q, "rows": ROWS, "page_table": TABLE, "seq_lens": LENGTHS, "sm_scale": SCALE}
EXTRA = {"extra_rows": ROWS, "extra_indices": INDICES}

BAD_CALLS = [
    # op, arguments, changes, message
    (sparse_decode, DECODE, {"q": Q[0]}, "expected [batch, s_q, heads, 192]"),
    (sparse_decode, DECODE, {"q": Q[..., :191]}, "q.shape=(2, 1, 3, 191): expected"),
    (sparse_decode, DECODE, {"q": Q[:, :, :0]}, "at least one head"),
    (sparse_decode, DECODE, {"q": Q.astype(jnp.float16)}, "expected bfloat16"),
    (sparse_decode, DECODE, {"rows": ROWS.latents}, "jmla.quantize"),
    (sparse_decode, DECODE, {"rows": dataclasses.replace(ROWS, rank=100)}, "192"),
    (sparse_decode, DECODE, {"indices": INDICES[:, 0]}, "expected [2, 1, topk]"),
    (sparse_decode, DECODE, {"indices": INDICES[:1]}, "expected [2, 1, topk]"),
    (sparse_decode, DECODE, {"indices": INDICES[..., :0]}, "at least 1"),
    (sparse_decode, DECODE, {"indices": INDICES.astype(jnp.uint32)}, "expected int32"),
    (sparse_decode, DECODE, {"topk_length": jnp.ones(3, jnp.int32)}, "expected (2,) or (2, 1)"),
    (sparse_decode, DECODE, {"topk_length": jnp.ones(2, jnp.float32)}, "expected int32"),
    (sparse_decode, DECODE, {"attn_sink": jnp.zeros(2)}, "expected float32 (3,)"),
    (sparse_decode, DECODE, {"attn_sink": jnp.zeros(3, jnp.bfloat16)}, "expected float32 (3,)"),
    (sparse_decode, DECODE, {"sm_scale": float("nan")}, "finite"),
    (sparse_decode, DECODE, {"sm_scale": float("inf")}, "finite"),
    (sparse_decode, DECODE, {"sm_scale": jnp.ones(1)}, "scalar"),
    (sparse_decode, DECODE, {"num_splits": 0}, "num_splits=0: expected a positive int"),
    (sparse_decode, DECODE, {"num_splits": 1.5}, "positive int"),
    (sparse_decode, DECODE, {"extra_rows": ROWS}, "only extra_rows is given"),
    (sparse_decode, DECODE, {"extra_indices": INDICES}, "only extra_indices is given"),
    (sparse_decode, DECODE, {"extra_topk_length": LENGTHS}, "extra_topk_length is given"),
    (sparse_decode, DECODE, {**EXTRA, "extra_rows": random_rows(0, 4, rank=64)}, "(128, 64)"),
    (sparse_decode, DECODE, {**EXTRA, "extra_rows": 3}, "expected cache rows"),
    (sparse_decode, DECODE, {**EXTRA, "extra_indices": INDICES[:1]}, "extra_indices.shape"),
    (sparse_decode, DECODE, {**EXTRA, "extra_topk_length": LENGTHS[:1]}, "extra_topk_length.sh"),
    (sparse_decode, DECODE, {"implementation": "cuda"}, "expected 'mosaic_gpu', 'xla'"),
    (sparse_prefill, PREFILL, {"q": Q}, "expected [tokens, heads, 192]"),
    (sparse_prefill, PREFILL, {"indices": INDICES}, "expected [2, topk]"),
    (sparse_prefill, PREFILL, {"topk_length": jnp.int32(1)}, "expected (2,)"),
    (sparse_prefill, PREFILL, {"attn_sink": jnp.zeros((1, 3))}, "expected float32 (3,)"),
    (sparse_prefill, PREFILL, {"sm_scale": float("-inf")}, "finite"),
    (dense_decode, DENSE, {"rows": ROWS.flat()}, "rows.reshape(-1, page_size)"),
    (dense_decode, DENSE, {"page_table": TABLE[:1]}, "expected [2, max_pages]"),
    (dense_decode, DENSE, {"page_table": TABLE[:, :0]}, "at least 1"),
    (dense_decode, DENSE, {"seq_lens": LENGTHS[:, None]}, "expected (2,)"),
    (dense_decode, DENSE, {"sm_scale": float("nan")}, "finite"),
]


@pytest.mark.parametrize(("op", "arguments", "changes", "message"), BAD_CALLS)
def test_wrong_arguments(op, arguments, changes, message):
    op(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        op(**{**arguments, **changes})


def test_wrong_arguments_are_found_while_tracing():
    with pytest.raises(ValueError, match="expected int32"):
        jax.eval_shape(
            lambda q, i: sparse_decode(q, ROWS, i, sm_scale=SCALE), Q, INDICES.astype(jnp.int16)
        )


@pytest.mark.parametrize(
    ("op", "arguments", "reasons"),
    [
        (sparse_decode, DECODE, ["512 + 64 values only, and these have 128 + 64"]),
        (
            sparse_decode,
            {**DECODE, "rows": quantize(ROWS.latents, KVLayout.FP4, rank=128)},
            ["reads FP4 latents of 512 + 64", "these have 128 + 64"],
        ),
        (sparse_prefill, PREFILL, ["512 + 64 values only, and these have 128 + 64"]),
        (dense_decode, DENSE, ["512 + 64 values only, and these have 128 + 64"]),
    ],
)
def test_a_named_implementation_that_cannot_serve_says_every_reason(op, arguments, reasons):
    with pytest.raises(NotImplementedError) as error:
        op(**arguments, implementation="mosaic_gpu")
    assert "Pass implementation=None" in str(error.value)
    assert all(reason in str(error.value) for reason in reasons)
