"""What ptxas makes of the kernels of grouped-query decode: no spills, two blocks at a time."""

import re
from pathlib import Path

import pytest

from tests.aot.ptxas import assert_good, compiled
from tests.aot.test_kernels import MIB

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jmla import gqa_decode, zero_key_values
from tests.aot.h200 import bytes_of, on_h200

dtype, shapes = json.loads(sys.argv[1])
temporary = []
for b, s_q, heads, kv_heads, dim, page_size in shapes:
    rows = jax.eval_shape(
        lambda: zero_key_values(dtype, (4096, page_size), kv_heads=kv_heads, head_dim=dim)
    )
    q = jax.ShapeDtypeStruct((b, s_q, heads, dim), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((b, 4096 // page_size), jnp.int32)
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    call = jax.jit(lambda *a: gqa_decode(*a, sm_scale=0.1, implementation="mosaic_gpu"))
    program = call.lower(*on_h200((q, rows, table, lengths))).compile()
    temporary.append(bytes_of(program)[0])
print(json.dumps(temporary))
"""
ONE_TILE, TWO_TILES = (256, 1, 64, 4, 128, 64), (256, 2, 64, 4, 128, 16)
SHORT_HEADS, ONE_REQUEST = (256, 3, 24, 2, 64, 1), (1, 1, 64, 4, 128, 64)


@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [
        ("bfloat16", [ONE_TILE, SHORT_HEADS]),
        ("fp8_e4m3", [ONE_TILE]),
        ("fp4_e2m1", [ONE_TILE, TWO_TILES, ONE_REQUEST]),
    ],
)
def test_kernels(tmp_path: Path, dtype: str, shapes: list[tuple[int, ...]]):
    printed, said = compiled(COMPILE, [dtype, shapes], tmp_path)
    temporary = dict(zip(shapes, printed, strict=True))
    assert_good(said)
    parts = temporary.pop(ONE_REQUEST, None)
    assert len(said) == len(shapes) + (parts is not None), "the parts of one request are joined"
    assert parts is None or parts >= 8 * 64 * 128 * 4
    assert max(temporary.values()) < MIB, "neither the cache nor its page table may be copied"
    if dtype != "bfloat16":
        registers = [int(x) for text in said for x in re.findall(r"Used (\d+) registers", text)]
        # Of a thread, for three blocks of 128 to fit a multiprocessor: 65536 / 384, in eights.
        assert sum(each > 168 for each in registers) == (TWO_TILES in shapes)
