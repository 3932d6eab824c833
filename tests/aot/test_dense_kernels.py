"""What ptxas makes of the kernels of dense decode: no spills, products that overlap, no copies."""

from pathlib import Path
from typing import Any

import pytest

from jmla.layouts import KVLayout
from tests.aot import ptxas
from tests.aot.ptxas import assert_good
from tests.aot.test_kernels import BLOCK, MIB

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jmla import KVLayout, dense_decode
from jmla.layouts import zero_rows
from tests.aot.h200 import bytes_of, on_h200

layout, options, shapes = json.loads(sys.argv[1])
temporary = []
for b, s_q, heads, page_size in shapes:
    rows = jax.eval_shape(lambda: zero_rows(KVLayout[layout], (4096, page_size), **options))
    q = jax.ShapeDtypeStruct((b, s_q, heads, rows.width), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((b, 4096 // page_size), jnp.int32)
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    call = jax.jit(lambda *a: dense_decode(*a, sm_scale=0.1, implementation="mosaic_gpu"))
    program = call.lower(*on_h200((q, rows, table, lengths))).compile()
    temporary.append(bytes_of(program)[0])
print(json.dumps(temporary))
"""


def compiled(
    folder: Path, layout: KVLayout, options: dict[str, Any], shapes: list[tuple[int, int, int, int]]
) -> tuple[list[int], list[str]]:
    """Temporary bytes of each program, and what ptxas said of each kernel."""
    return ptxas.compiled(COMPILE, [layout.name, options, shapes], folder)


@pytest.mark.parametrize(
    ("layout", "options", "shapes"),
    [
        # Of pages that come in boxes and others, of tokens that differ, of ordered requests.
        (KVLayout.BF16, {}, [(256, 1, 128, 64), (128, 3, 20, 16), (128, 1, 16, 1)]),
        (BLOCK, {"scale_format": "fp32"}, [(256, 2, 64, 64), (128, 2, 16, 64)]),
        (KVLayout.FP4, {}, [(256, 1, 128, 64), (256, 3, 20, 64)]),
        (KVLayout.FP8_V4, {}, [(256, 1, 128, 64)]),
    ],
)
def test_a_full_batch(
    tmp_path: Path,
    layout: KVLayout,
    options: dict[str, Any],
    shapes: list[tuple[int, int, int, int]],
):
    temporary, said = compiled(tmp_path, layout, options, shapes)
    assert len(said) >= len(shapes)
    assert_good(said)
    assert max(temporary) < MIB, "neither the cache nor its page table may be copied"


def test_one_request_is_cut_into_many_parts_and_joined(tmp_path: Path):
    (temporary,), said = compiled(tmp_path, KVLayout.BF16, {}, [(1, 1, 128, 64)])
    a_part = 128 * 512 * 4
    assert len(said) == 2 and 16 * a_part <= temporary
    assert_good(said)
