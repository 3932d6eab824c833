"""What XLA makes of the ops and of the decode loop on an H200: memory bounds, updates in place."""

import re

import jax
import jax.numpy as jnp
import pytest

from examples import decode_loop as demo
from examples.byte_lm import ByteLMConfig, init_params
from examples.generation import DecodeState, decode_loop, new_caches
from jmla import KVLayout, append, init_cache, sparse_decode, sparse_prefill
from jmla._xla_attention import MAX_GATHERED_ROWS
from jmla.layouts import zero_rows
from tests.aot.h200 import bytes_of, on_h200

MIB = 1 << 20


def shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("layout", [KVLayout.BF16, KVLayout.FP4])
@pytest.mark.parametrize(("heads", "topk"), [(16, 256), (128, 2048)])
def test_a_long_prompt_stays_within_the_bound(layout, heads, topk):
    rows = jax.eval_shape(lambda: zero_rows(layout, (1 << 16,)))
    arguments = on_h200((shaped(4096, heads, 576), rows, shaped(4096, topk, dtype=jnp.int32)))
    program = jax.jit(lambda *a: sparse_prefill(*a, sm_scale=0.1)).lower(*arguments).compile()
    gathered = MAX_GATHERED_ROWS * 576 * 2
    assert bytes_of(program)[0] < gathered + 24 * MIB


def test_a_full_decode_batch_stays_within_the_bound():
    rows = jax.eval_shape(
        lambda: zero_rows(KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, (1 << 18,))
    )
    arguments = on_h200((shaped(128, 2, 128, 576), rows, shaped(128, 2, 2048, dtype=jnp.int32)))
    program = jax.jit(lambda *a: sparse_decode(*a, sm_scale=0.1)).lower(*arguments).compile()
    assert bytes_of(program)[0] < MAX_GATHERED_ROWS * 576 * 2 + 24 * MIB


@pytest.mark.parametrize("layout", KVLayout)
def test_append_updates_the_cache_in_place(layout):
    cache = jax.eval_shape(lambda: init_cache(layout, num_pages=256, index_dim=128))
    width = cache.rows.width
    arguments = on_h200((cache, shaped(64, dtype=jnp.int32), shaped(64, width), shaped(64, 128)))
    program = jax.jit(append, donate_argnums=0).lower(*arguments).compile()
    temporary, reused = bytes_of(program)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert reused == stored
    assert temporary < stored // 8


@pytest.mark.parametrize("layout", demo.LAYOUTS)
def test_the_decode_loop_carries_its_cache_without_copies(layout):
    config = ByteLMConfig()
    plan = demo.make_plan(demo.parse_arguments(["--layout", layout]), config)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config, dtype=jnp.bfloat16))

    def start() -> tuple[DecodeState, jax.Array]:
        caches, page_table = new_caches(plan, config, requests=1, context=8192)
        one = jnp.zeros((1,), jnp.int32)
        return DecodeState(caches, one, one, jax.random.key(0)), page_table

    state, page_table = jax.eval_shape(start)
    arguments = on_h200((params, state, page_table, shaped(dtype=jnp.float32)))
    program = decode_loop.lower(*arguments, steps=32, config=config, plan=plan).compile()
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
    assert bytes_of(program)[1] >= stored
    slots = state.caches[0].num_slots
    text = program.as_text()
    assert text and f"[{slots}," in text
    assert not re.findall(rf"= \w+\[(?:{slots}|{slots // 64},64),\d+\]\S* copy", text)
