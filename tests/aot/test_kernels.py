"""What ptxas makes of the Hopper kernels: no spills, products that overlap, no copied cache."""

from pathlib import Path
from typing import Any

import pytest

from jmla.layouts import KVLayout
from tests.aot import ptxas
from tests.aot.ptxas import assert_good

MIB = 1 << 20
BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jmla import KVLayout, sparse_decode, sparse_prefill
from jmla.layouts import from_bytes, to_bytes, zero_rows
from tests.aot.h200 import bytes_of, on_h200

op, layout, options, shapes = json.loads(sys.argv[1])
op = {"sparse_decode": sparse_decode, "sparse_prefill": sparse_prefill}[op]
in_place, paged = options.pop("in_place", False), {}
if "page_size" in options:
    paged = {"page_size": options.pop("page_size")}

def cache():
    rows = zero_rows(KVLayout[layout], (4096, 64), **options)
    if in_place:
        return from_bytes(to_bytes(rows), rows.layout, in_place=True, **options, **paged)
    return rows

rows = jax.eval_shape(cache)
temporary = []
for b, heads in shapes:
    each = (1,) if op is sparse_decode else ()
    q = jax.ShapeDtypeStruct((b, *each, heads, rows.width), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((b, *each, 2048), jnp.int32)
    call = jax.jit(lambda *a: op(*a, sm_scale=0.1, implementation="mosaic_gpu"))
    program = call.lower(*on_h200((q, rows, indices))).compile()
    temporary.append(bytes_of(program)[0])
print(json.dumps(temporary))
"""
FULL_BATCH = [(128, 16), (128, 32), (128, 64), (128, 128)]


def compiled(
    folder: Path,
    layout: KVLayout,
    options: dict[str, Any],
    shapes: list[tuple[int, int]],
    op: str = "sparse_decode",
) -> tuple[list[int], list[str]]:
    """Temporary bytes of each program, and what ptxas said of each kernel."""
    return ptxas.compiled(COMPILE, [op, layout.name, options, shapes], folder)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (BLOCK, {"scale_format": "pow2"}),
        (BLOCK, {"scale_format": "fp32"}),
        (BLOCK, {"scale_format": "pow2", "in_place": True}),
        (BLOCK, {"scale_format": "fp32", "in_place": True}),
        (KVLayout.FP8_NOPE_FP8_ROPE, {}),
        (KVLayout.FP4, {}),
        (KVLayout.FP8_V4, {}),
        (KVLayout.FP8_V4, {"in_place": True, "page_size": 64}),
        (KVLayout.BF16, {}),
    ],
)
def test_a_full_batch(tmp_path: Path, layout: KVLayout, options: dict[str, Any]):
    temporary, said = compiled(tmp_path, layout, options, FULL_BATCH)
    assert len(said) >= len(FULL_BATCH)
    assert_good(said)
    assert max(temporary) < MIB, "a cache of 4096 pages must not be copied"


@pytest.mark.parametrize(
    ("layout", "batch"), [(BLOCK, 1), (BLOCK, 16), (KVLayout.FP8_NOPE_FP8_ROPE, 16)]
)
def test_a_small_batch_is_cut_into_parts_and_joined(tmp_path: Path, layout: KVLayout, batch: int):
    """One request in narrow blocks, sixteen in wide ones."""
    heads = 128
    (temporary,), said = compiled(tmp_path, layout, {}, [(batch, heads)])
    a_part = batch * heads * 512 * 4
    assert said and 2 * a_part <= temporary <= 34 * a_part
    assert_good(said)


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        # Blocks of prefill's own, then those of decode, in parts for a single token.
        (KVLayout.BF16, [(4096, 128), (4096, 16), (1, 64)]),
        (BLOCK, [(4096, 128), (4096, 16)]),
        (KVLayout.FP8_NOPE_FP8_ROPE, [(4096, 64)]),
        (KVLayout.FP4, [(4096, 64), (4096, 16)]),
        (KVLayout.FP8_V4, [(4096, 64), (4096, 16)]),
    ],
)
def test_prefill(tmp_path: Path, layout: KVLayout, shapes: list[tuple[int, int]]):
    options = {"scale_format": "fp32"} if layout is BLOCK else {}
    temporary, said = compiled(tmp_path, layout, options, shapes, op="sparse_prefill")
    assert len(said) >= len(shapes)
    assert_good(said)
    assert max(temporary) < 34 * MIB, "neither the cache nor the queries may be copied"
