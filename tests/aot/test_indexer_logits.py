"""What ptxas makes of the kernel of index logits: no spills, and XLA adds no copy of the keys."""

from pathlib import Path

from tests.aot.ptxas import assert_good, compiled

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jmla import indexer_logits, paged_indexer_logits
from jmla.layouts import BF16IndexKeyRows, IndexKeyRows, paged_index_keys
from tests.aot.h200 import bytes_of, on_h200

def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)

def leaves(*shape, dim):
    return jax.eval_shape(lambda: IndexKeyRows.zeros(shape, dim=dim))

def packed(pages, page_size, dim):
    page = shaped(pages, page_size * (dim + 4), dtype=jnp.uint8)
    return jax.eval_shape(lambda page: paged_index_keys(page, page_size=page_size, dim=dim), page)

def keys_dtype(form):
    return jnp.bfloat16 if form == "bf16" else jnp.float8_e4m3fn

temporary = []
for form, *sizes, heads, dim in json.loads(sys.argv[1]):
    if form == "ragged":
        tokens, keys = sizes
        operands = [
            shaped(tokens, heads, dim, dtype=jnp.float8_e4m3fn),
            shaped(tokens, heads, dtype=jnp.float32),
            leaves(keys, dim=dim),
            shaped(tokens),
            shaped(tokens),
        ]
    else:
        requests, queries, pages, page_size = sizes
        keys = leaves(9000, page_size, dim=dim)
        if form == "bf16":
            keys = jax.eval_shape(lambda: BF16IndexKeyRows.zeros((9000, page_size), dim=dim))
        if form == "packed":
            keys = packed(9000, page_size, dim)
        operands = [
            shaped(requests, queries, heads, dim, dtype=keys_dtype(form)),
            shaped(requests, queries, heads, dtype=jnp.float32),
            keys,
            shaped(requests, pages),
            shaped(requests, queries),
        ]
    score = indexer_logits if form == "ragged" else paged_indexer_logits

    def logits(*operands, score=score):
        return score(*operands, implementation="mosaic_gpu")

    program = jax.jit(logits).lower(*on_h200(operands)).compile()
    temporary.append(bytes_of(program)[0])
print(json.dumps(temporary))
"""
CASES = [
    ("leaves", 64, 1, 2048, 64, 64, 128),
    ("packed", 64, 2, 512, 64, 64, 128),
    ("leaves", 3, 7, 99, 53, 37, 64),
    ("packed", 1, 1, 40, 16, 1, 128),
    ("bf16", 64, 1, 512, 64, 64, 128),
    ("bf16", 3, 7, 99, 53, 37, 64),
    ("ragged", 4096, 32768, 64, 128),
    ("ragged", 4096, 32769, 32, 128),
    ("ragged", 1000, 5000, 9, 64),
    ("ragged", 512, 2048, 4, 128),
]


def test_forms_of_keys_and_numbers_of_heads(tmp_path: Path):
    temporary, said = compiled(COMPILE, CASES, tmp_path)
    assert len(said) == len(CASES)
    assert_good(said)
    assert max(temporary) < 1 << 16
