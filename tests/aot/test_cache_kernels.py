"""The kernels that write and convert rows, compiled for an H200: no spills, no copy of a cache."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.aot.ptxas import assert_good, compiled

COMPILE = """
import functools, json, sys
import jax
import jax.numpy as jnp
from jmla import (Cache, KVLayout, RawLatents, append, convert, dequantize, init_cache, move_pages,
    quantize)
from jmla.layouts import from_bytes, paged_index_keys, to_bytes
from tests.aot.h200 import bytes_of, on_h200

layout, options, packed = json.loads(sys.argv[1])
layout, kernel, many = KVLayout[layout], {"implementation": "mosaic_gpu"}, 1 << 18

def make():
    cache = init_cache(layout, num_pages=4096, page_size=64, index_dim=128, **options)
    if not packed:
        return cache
    paged = {"page_size": 64} if layout is KVLayout.FP8_V4 else options
    rows = from_bytes(to_bytes(cache.rows), layout, in_place=True, **paged)
    return Cache(rows, paged_index_keys(cache.index_keys.pack(), page_size=64))

def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

programs = {}
def add(name, function, *arguments, donate=()):
    function = jax.jit(function, donate_argnums=donate)
    program = function.lower(*on_h200(arguments)).compile()
    text = program.as_text()
    programs[name] = [*bytes_of(program), text.count('custom_call_target="mosaic_gpu'), text]

cache = jax.eval_shape(make)
width = cache.rows.width
for n in (64, 100_000):
    new = shaped(n, dtype=jnp.int32), shaped(n, width), shaped(n, 128)
    add(f"append {n}", functools.partial(append, **kernel), cache, *new, donate=0)

for interleaved in (True, False)[: 2 if layout is KVLayout.BF16 else 1]:
    angles = shaped(64, 32, dtype=jnp.float32)
    raw = RawLatents(shaped(64, width), shaped(width - 64), angles, angles, eps=1e-6,
        interleaved=interleaved)
    add(f"append raw {interleaved}", functools.partial(append, **kernel), cache,
        shaped(64, dtype=jnp.int32), raw, shaped(64, 128), donate=0)

def decode(cache, *new):
    step = lambda cache, each: (append(cache, *each, **kernel), None)
    return jax.lax.scan(step, cache, new)[0]

add("loop", decode, cache, *(shaped(9, *x.shape, dtype=x.dtype) for x in
    (shaped(64, dtype=jnp.int32), shaped(64, width), shaped(64, 128))), donate=0)
pages = shaped(32, dtype=jnp.int32)
add("move", lambda c, a, b, s: move_pages(c, a, b, source=s, **kernel),
    cache, pages, pages, cache, donate=0)
add("move within", functools.partial(move_pages, **kernel), cache, pages, pages, donate=0)
add("gather", lambda rows, slots: dequantize(rows, slots=slots, **kernel),
    cache.rows, shaped(1 << 16, dtype=jnp.int32))
add("dequantize", functools.partial(dequantize, **kernel), cache.rows)
if not packed:
    for dtype in (jnp.bfloat16, jnp.float32):
        add(f"quantize {dtype.__name__}", functools.partial(quantize, layout=layout, **options,
            **kernel), shaped(many, width, dtype=dtype))
    if width == 576:
        target = KVLayout.BF16 if layout is KVLayout.FP4 else KVLayout.FP4
        add("convert", functools.partial(convert, layout=target, **kernel), cache.rows)
if layout is KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE:
    add("convert scaled", functools.partial(convert, layout=KVLayout.FP8_NOPE_FP8_ROPE, scale=0.5,
        **kernel), cache.rows)
stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
print(json.dumps([stored, programs]))
"""
BLOCK = "FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE"


@pytest.mark.parametrize(
    ("layout", "options", "packed"),
    [
        (BLOCK, {"scale_format": "pow2"}, False),
        (BLOCK, {"scale_format": "fp32"}, True),
        (BLOCK, {"scale_format": "fp32"}, False),
        ("FP8_NOPE_FP8_ROPE", {"scale": 0.5}, False),
        ("FP4", {}, False),
        ("FP8_V4", {}, False),
        ("FP8_V4", {}, True),
        ("BF16", {}, False),
    ],
)
def test_no_spills_and_no_copies(
    tmp_path: Path, layout: str, options: dict[str, Any], packed: bool
):
    (stored, programs), said = compiled(COMPILE, [layout, options, packed], tmp_path)
    assert len(said) >= 4
    assert_good(said)
    for name, (temporary, reused, kernels, text) in programs.items():
        if name == "dequantize" and layout == "BF16":
            continue  # there is nothing to do
        moved = 32 * stored // 4096 if name == "move within" else 0
        assert kernels == 1 + bool(moved), name
        assert temporary < (1 << 16) + moved, name
        copied = re.findall(r"= \w+\[[\d,]*\d{3}[\d,]*\]\S* copy\(", text)
        assert not copied, name
        if name.startswith(("append", "loop", "move")):
            assert reused >= stored, name
