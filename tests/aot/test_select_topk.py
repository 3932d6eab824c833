"""What ptxas makes of the top-k kernel: no spills, and XLA adds no copy of the scores."""

from pathlib import Path

from tests.aot.ptxas import assert_good, compiled

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jmla import select_paged_indices, select_topk
from tests.aot.h200 import bytes_of, on_h200

def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)

temporary = []
for rows, columns, k, kind in json.loads(sys.argv[1]):
    operands = [shaped(rows, columns, dtype=jnp.float32), shaped(rows)]
    if kind == "paged":
        operands.append(shaped(rows, -(-columns // 64)))
    if kind == "starts":
        operands.append(shaped(rows))

    def select(scores, lengths, *rest):
        if kind == "paged":
            return select_paged_indices(
                scores, lengths, k, *rest, page_size=64, implementation="mosaic_gpu"
            )
        starts = rest[0] if rest else None
        return select_topk(scores, lengths, k, row_starts=starts, implementation="mosaic_gpu")

    program = jax.jit(select).lower(*on_h200(operands)).compile()
    temporary.append(bytes_of(program)[0])
print(json.dumps(temporary))
"""
CASES = [
    (1, 32768, 2048, ""),
    (4096, 8192, 2048, "starts"),
    (4096, 16384, 512, ""),
    (64, 32768, 2176, "paged"),
    (64, 32767, 2048, "starts"),
    (1, 1 << 20, 4096, ""),
    (64, 131072, 2048, "paged"),
    (1024, 131072, 2048, "starts"),
    (1024, 131071, 4096, ""),
    (4096, 4096, 512, "starts"),
    (512, 16384, 4096, "starts"),
    (1024, 1 << 20, 2048, ""),
]


def test_every_way_to_divide_the_work(tmp_path: Path):
    temporary, said = compiled(COMPILE, CASES, tmp_path)
    assert len(said) == len(CASES)
    assert_good(said)
    assert max(temporary) < 1 << 16
