"""What ptxas makes of the kernels of dense decode: no spills, products that overlap, no copies."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jmla.layouts import KVLayout
from tests.aot.h200 import sharding
from tests.aot.test_kernels import BLOCK, MIB, assert_good

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
    sharding()  # skips where there is nothing to compile with
    dumps = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([layout.name, options, shapes])],
        env=os.environ | dumps,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), [p.read_text() for p in folder.glob("*.ptxas")]


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
