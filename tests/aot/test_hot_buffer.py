"""Decode steps over host-resident caches, compiled for an H200: no spills, no copy of any rows."""

import re
from pathlib import Path

import pytest

from tests.aot.ptxas import assert_good, compiled

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from jmla import KVLayout, init_cache
from jmla.hisparse import (
    HiSparseSizes, admit, append, init_state, plan_swap, replay, swap_in
)
from tests.aot.h200 import bytes_of, on_h200

kernel = {"implementation": "mosaic_gpu"}
programs = []
for layout, requests, k, size, newest, context in json.loads(sys.argv[1]):
    sizes = HiSparseSizes(
        requests=requests, max_length=context, page_size=64, num_pages=8192,
        num_buffer_pages=4096, device_buffer_size=size, newest=newest,
    )
    layout = KVLayout[layout]
    state = jax.eval_shape(lambda: init_state(layout, sizes, index_dim=128, host_memory="device"))
    cache = jax.eval_shape(lambda: init_cache(layout, num_pages=2048, index_dim=128))
    tokens = newest
    shaped = jax.ShapeDtypeStruct
    new = tuple(
        shaped((5, requests, tokens, width), jnp.bfloat16) for width in (cache.rows.width, 128)
    )
    positions = shaped((5, requests, tokens, k // tokens), jnp.int32)
    lens = shaped((requests,), jnp.int32)
    one, pages = shaped((), jnp.int32), shaped((1024,), jnp.int32)

    def decode(state, lens, latents, keys, positions):
        def step(carry, now):
            state, lens = carry
            *tokens, positions = now
            state = append(state, lens, *tokens, **kernel)
            state, slots = swap_in(state, positions, lens, **kernel)
            return (state, lens + 1), slots
        return jax.lax.scan(step, (state, lens), (latents, keys, positions))

    def enter(state, request, length, cache, pages):
        return admit(state, request, length, cache, pages, **kernel)

    def follow(state, positions, lens):
        residency, swap = plan_swap(state.residency, positions, lens, **kernel)
        return replay(state, residency, swap, **kernel), swap.slots

    selection = shaped(positions.shape[1:], jnp.int32)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    for function, arguments in (
        (decode, (state, lens, *new, positions)),
        (enter, (state, one, one, cache, pages)),
        (follow, (state, selection, lens)),
    ):
        program = jax.jit(function, donate_argnums=0).lower(*on_h200(arguments)).compile()
        text = program.as_text()
        kernels = text.count('custom_call_target="mosaic_gpu')
        programs.append([*bytes_of(program), stored, kernels, text])
print(json.dumps(programs))
"""
BLOCK = "FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE"


@pytest.mark.parametrize(
    "cases",
    [
        [(BLOCK, 16, 2048, 4096, 1, 1 << 17), ("FP8_V4", 3, 777, 1001, 1, 100_003)],
        [("BF16", 8, 8192, 16384, 4, 1 << 17), ("FP4", 1, 6, 6, 2, 1000)],
    ],
    ids=["one token", "drafts"],
)
def test_no_spills_and_no_copies(tmp_path: Path, cases: list[tuple[str | int, ...]]):
    programs, said = compiled(COMPILE, cases, tmp_path)
    assert_good(said)
    for i, (temporary, reused, stored, kernels, text) in enumerate(programs):
        # A step has one that says where its tokens go, one for the swap, and one each for host
        # rows, buffer rows and index keys; an admission has these three.
        assert kernels == (5, 3, 2)[i % 3]
        assert reused >= stored
        assert temporary < 1 << 22
        assert not re.findall(r"= \w+\[\d{4,},64,\d+\]\S* copy\(", text)
        assert not re.findall(r"= \w+\[\d{5,},\d+\]\S* copy\(", text)
