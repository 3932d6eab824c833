"""What ptxas makes of the kernels of index queries and of the joined choice: no spills."""

from pathlib import Path

from tests.aot.ptxas import assert_good, compiled

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jmla import RawIndexQueries, paged_indexer_topk, prepare_index_query
from jmla.layouts import BF16IndexKeyRows, IndexKeyRows
from tests.aot.h200 import bytes_of, on_h200

def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)

temporary = []
for form, *sizes in json.loads(sys.argv[1]):
    if form == "query":
        tokens, heads, dim, rope_dim, interleaved, hadamard, dtype = sizes
        angles = shaped(tokens, rope_dim // 2, dtype=jnp.float32)
        raw = RawIndexQueries(
            shaped(tokens, heads, dim, dtype=jnp.dtype(dtype)),
            shaped(tokens, heads, dtype=jnp.float32),
            angles,
            angles,
            interleaved=interleaved,
        )

        def run(raw, hadamard=hadamard):
            return prepare_index_query(raw, hadamard=hadamard, implementation="mosaic_gpu")

        operands = [raw]
    else:
        requests, pages, heads, dim, k = sizes
        rows = BF16IndexKeyRows if form == "bf16" else IndexKeyRows
        dtype = jnp.bfloat16 if form == "bf16" else jnp.float8_e4m3fn
        operands = [
            shaped(requests, 1, heads, dim, dtype=dtype),
            shaped(requests, 1, heads, dtype=jnp.float32),
            jax.eval_shape(lambda: rows.zeros((9000, 64), dim=dim)),
            shaped(requests, pages),
            shaped(requests, 1),
        ]

        def run(*operands, k=k):
            return paged_indexer_topk(
                *operands, k, slots=True, first=4, last=64, implementation="mosaic_gpu"
            )

    program = jax.jit(run).lower(*on_h200(operands)).compile()
    temporary.append(bytes_of(program)[0])
print(json.dumps(temporary))
"""
CASES = [
    ("query", 64, 64, 128, 64, False, False, "bfloat16"),
    ("query", 3, 5, 64, 16, False, True, "float32"),
    ("fp8", 64, 2048, 64, 128, 2048),
    ("fp8", 10, 16384, 64, 128, 4096),
    ("bf16", 64, 2000, 64, 128, 2048),
]
KERNELS = 2 + 2 * 3


def test_queries_and_joined_choices(tmp_path: Path):
    temporary, said = compiled(COMPILE, CASES, tmp_path)
    assert len(said) == KERNELS
    assert_good(said)
    # The candidates of some requests and of all blocks, 48 KiB each; logits would be more.
    requests = [int(case[1]) for case in CASES if case[0] != "query"]
    bounds = [1 << 16] * 2 + [(count + 132) * 49152 + (1 << 16) for count in requests]
    for size, bound in zip(temporary, bounds, strict=True):
        assert size <= bound
