"""The call of the Hopper kernel, on any machine: a stand-in in jnp takes the kernel's place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla import _implementation, _mosaic_decode
from jmla.attention import sparse_decode
from jmla.layouts import BF16Rows, KVLayout, Rows, from_bytes, quantize, to_bytes
from tests.attention.cases import SCALE, random_indices, random_queries, random_rows, same_bits
from tests.attention.exact import (
    BF16,
    FORMATS,
    FP4,
    FP8,
    PACKED_FP32,
    PACKED_POW2,
    PAGED_V4,
    POW2,
    V4,
    assert_exact,
    exact_decode,
    poison_all,
    rows_of,
)
from tests.attention.stand_in import stand_in
from tests.helpers import assert_close

kernels = pytest.importorskip("pallas_kernels.sparse_decode", reason="needs Pallas for GPUs")

EVERY_FORMAT = (*FORMATS, FP8, FP4, V4, PAGED_V4, PACKED_POW2, PACKED_FP32)
SINK = jnp.array([0.5, -jnp.inf, jnp.inf], jnp.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The shape of the queries and the formats of each call that was traced."""
    traced: list[tuple[Any, ...]] = []

    def recorded(q, lists, **options):
        assert q.dtype == jnp.bfloat16 and all(each.format in kernels.FORMATS for each in lists)
        traced.append((q.shape, *(each.format for each in lists)))
        return stand_in(q, lists, **options)

    monkeypatch.setattr(kernels, "sparse_decode", recorded)
    # Another function has a cache of its own, so that no later call gets the stand-in.
    fresh = jax.jit(lambda *args: _mosaic_decode._attend(*args), static_argnums=2)
    monkeypatch.setattr(_mosaic_decode, "_compiled", fresh)
    return traced


def decode(q, rows, indices, **options):
    return sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="mosaic_gpu", **options)


def test_the_kernel_reads_what_the_table_says():
    formats = {_mosaic_decode.format_name(rows_of(form, 0, 1)) for form in EVERY_FORMAT}
    assert formats == set(kernels.FORMATS)
    assert kernels.ROPE_DIM == _mosaic_decode.ROPE_DIM
    assert {form[0] for form in EVERY_FORMAT} == set(_mosaic_decode.LAYOUTS)
    for form in EVERY_FORMAT:
        rows = rows_of(form, 0, 1)
        assert kernels.FORMATS[_mosaic_decode.format_name(rows)].width == rows.width
        assert not _mosaic_decode.layout_reasons(rows.layout, rows.rank, rows.rope_dim)
        assert _mosaic_decode.layout_reasons(rows.layout, rows.rank - 64, rows.rope_dim + 64)


@pytest.mark.parametrize("form", EVERY_FORMAT)
@pytest.mark.parametrize("per_token", [None, False, True])
def test_arguments_reach_the_kernel(calls, form, per_token):
    rows, indices = rows_of(form, 1, 3, 7), random_indices(2, 2, 3, 9, slots=21)
    q = random_queries(0, 2, 3, 3, width=rows.width)
    lengths = None
    if per_token is not None:
        lengths = jnp.array([[4, 0, 100], [9, 1, -3]] if per_token else [5, 0], jnp.int32)
    ours = decode(q, rows, indices, topk_length=lengths, attn_sink=SINK)
    exact = exact_decode(q, [(rows, indices, lengths)], sm_scale=SCALE, attn_sink=SINK)
    assert_exact(ours, exact)
    assert calls == [((6, 3, rows.width), _mosaic_decode.format_name(rows))]


def test_a_second_cache_reaches_the_kernel(calls):
    rows, extra = rows_of(POW2, 1, 3, 7), rows_of(BF16, 2, 30)
    q, indices = random_queries(0, 2, 1, 3, width=576), random_indices(2, 2, 1, 9, slots=21)
    extra_indices, lengths = random_indices(3, 2, 1, 5, slots=30), jnp.array([2, 5], jnp.int32)
    ours = decode(
        q,
        poison_all(rows, indices),
        indices,
        extra_rows=extra,
        extra_indices=extra_indices,
        extra_topk_length=lengths,
    )
    caches = [(rows, indices, None), (extra, extra_indices, lengths)]
    assert_exact(ours, exact_decode(q, caches, sm_scale=SCALE))
    assert calls == [((2, 3, 576), "block_scale_pow2", "bf16")]


def test_a_call_outside_jit_is_traced_once(calls):
    q, indices = random_queries(0, 2, 1, 3, width=576), random_indices(2, 2, 1, 9, slots=21)
    for seed in range(3):
        decode(q, rows_of(POW2, seed, 3, 7), indices, num_splits=2)
    assert len(calls) == 1


@pytest.mark.parametrize("form", EVERY_FORMAT)
def test_a_call_outside_jit_hands_its_cache_on_as_it_is(calls, form):
    """Whatever is done to a cache outside jit copies it."""
    rows = rows_of(form, 1, 3, 7)
    q, indices = Q(0, 2, 1, 3)[..., : rows.width], random_indices(2, 2, 1, 9, slots=21)
    traced = jax.make_jaxpr(lambda rows: decode(q, rows, indices))(rows)
    users = [e for e in traced.eqns if any(x in traced.jaxpr.invars for x in e.invars)]
    assert [e.params.get("name") for e in users] == ["<lambda>"]


def stacked(make) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *(make(seed) for seed in range(3)))


Q = functools.partial(random_queries, width=576)
VMAP = {
    # what is batched: how q, rows, indices, topk_length and attn_sink are; queries of a launch
    "q": ("q", 12),
    "indices": ("indices", 12),
    "q and indices": ("q indices", 12),
    "lengths": ("lengths", 12),
    "rows": ("rows", 4),
    "all": ("q rows indices lengths sink", 4),
    "sinks": ("sink", 4),
}


@pytest.mark.parametrize(("names", "queries"), VMAP.values(), ids=VMAP)
def test_vmap(calls, names: str, queries: int):
    makers = {
        "q": lambda seed: Q(seed, 2, 2, 3),
        "rows": lambda seed: rows_of(FORMATS[2], seed, 3, 7),
        "indices": lambda seed: random_indices(seed, 2, 2, 9, slots=21),
        "lengths": lambda seed: jnp.array([seed, 9 - seed], jnp.int32),
        "sink": lambda seed: SINK + np.float32(seed),
    }
    batched = [name in names.split() for name in makers]
    args = [
        stacked(make) if moves else make(1)
        for make, moves in zip(makers.values(), batched, strict=True)
    ]

    def one(q, rows, indices, lengths, sink):
        return decode(q, rows, indices, topk_length=lengths, attn_sink=sink)

    ours = jax.vmap(one, in_axes=[0 if moves else None for moves in batched])(*args)
    assert calls[-1][0] == (queries, 3, 576)  # before it, one element is traced for its shapes
    for i in range(3):
        mine = [
            jax.tree.map(lambda x, i=i: x[i], arg) if moves else arg
            for arg, moves in zip(args, batched, strict=True)
        ]
        wanted = one(*mine)
        assert_close(ours[0][i], wanted[0], abs_tol=1e-3, rel_tol=8e-3)
        assert_close(ours[1][i], wanted[1], abs_tol=1e-5, rel_tol=1e-5)


def test_vmap_of_vmap_and_over_nothing(calls):
    q, rows = Q(0, 2, 3, 2, 1, 3), rows_of(POW2, 1, 3, 7)
    indices = random_indices(2, 2, 1, 9, slots=21)
    over = jax.vmap(jax.vmap(lambda q: decode(q, rows, indices)))
    assert over(q)[0].shape == (2, 3, 2, 1, 3, 512)
    assert calls[-1] == ((12, 3, 576), "block_scale_pow2")
    nothing = jax.vmap(lambda q: decode(q, rows, indices))(q[0, :0])
    assert [x.shape for x in nothing] == [(0, 2, 1, 3, 512), (0, 2, 1, 3)]


@pytest.mark.parametrize("form", [BF16, PACKED_POW2], ids=["bf16", "packed"])
@pytest.mark.parametrize("compiled", [False, True])
def test_derivatives_are_those_of_xla(calls, form, compiled: bool):
    q, rows, extra = Q(0, 2, 2, 3), rows_of(form, 1, 3, 7), rows_of(BF16, 5, 9)
    indices, more = random_indices(2, 2, 2, 9, slots=21), random_indices(3, 2, 2, 5, slots=9)
    lengths, sink = jnp.array([9, 4], jnp.int32), jnp.array([0.5, -1.0, 2.0], jnp.float32)

    def loss(implementation, q, scale, sink):
        out, lse = sparse_decode(
            q,
            rows,
            indices,
            sm_scale=scale,
            topk_length=lengths,
            attn_sink=sink,
            extra_rows=extra,
            extra_indices=more,
            implementation=implementation,
        )
        return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

    args = (q, jnp.float32(SCALE), sink)
    gradient = jax.grad(loss, argnums=(1, 2, 3))
    gradient = jax.jit(gradient, static_argnums=0) if compiled else gradient
    wanted, ours = gradient("xla", *args), gradient("mosaic_gpu", *args)
    assert calls, "the primal results are the kernel's"
    for mine, theirs in zip(ours, wanted, strict=True):
        assert bool(jnp.any(theirs != 0))
        assert_close(mine, theirs, abs_tol=2e-2, rel_tol=1e-2)


def test_none_takes_the_kernel_on_hopper_alone(calls, monkeypatch):
    q, rows = Q(0, 2, 1, 3), rows_of(POW2, 1, 3, 7)
    indices = random_indices(2, 2, 1, 9, slots=21)
    for hopper in (False, True):
        monkeypatch.setattr(_implementation, "on_hopper", lambda hopper=hopper: hopper)
        sparse_decode(q, rows, indices, sm_scale=SCALE)
        assert bool(calls) == hopper
    sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="xla")
    sparse_decode(q[:0], rows, indices[:0], sm_scale=SCALE)
    small = random_rows(1, 3, 7)
    sparse_decode(q[..., :192], small, indices, sm_scale=SCALE)
    empty = BF16Rows(jnp.zeros((0, 576), jnp.bfloat16), rank=512, rope_dim=64)
    sparse_decode(q, empty, indices, sm_scale=SCALE)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("layout", "rank", "served"),
    [*((layout, layout.default_rank, True) for layout in KVLayout), (KVLayout.FP8_V4, 512, False)],
)
def test_a_plans_decode_reaches_the_kernel(
    calls, monkeypatch, layout: KVLayout, rank: int, served: bool
):
    monkeypatch.setattr(_implementation, "on_hopper", lambda: True)
    config = jmla.Config(
        num_heads=3, sm_scale=0.1, layout=layout, kv_lora_rank=rank, platform="sm_90"
    )
    resolved = jmla.resolve(config)
    cache = resolved.init_cache(2)
    lengths = jnp.array([5], jnp.int32)
    batch = jmla.make_batch(
        lengths, lengths * 0 + 1, jnp.zeros((1, 1), jnp.int32), num_tokens=1, page_size=64
    )
    try:
        q = random_queries(0, 1, 1, 3, width=rank + 64)
        resolved.decode(q, cache, batch, jnp.zeros((1, 7), jnp.int32))
    finally:
        jax.clear_caches()  # the plan's own jit holds the stand-in
    assert bool(calls) == served
    said = resolved.decode.reasons[-1]
    assert said.startswith("runs on the device kernel for sm_90 (Hopper)") == bool(calls)


def reasons_of(rows: Rows, **options: Any) -> str:
    q, indices = Q(0, 2, 1, 3)[..., : rows.width], jnp.zeros((2, 1, 4), jnp.int32)
    with pytest.raises(NotImplementedError) as error:
        decode(options.pop("q", q), rows, options.pop("indices", indices), **options)
    return str(error.value)


def test_every_reason_against_the_kernel_is_told():
    rows, indices = rows_of(POW2, 1, 3, 7), jnp.zeros((2, 1, 4), jnp.int32)
    v4 = quantize(jnp.zeros((3, 7, 512)), KVLayout.FP8_V4, rank=384, rope_dim=128)
    text = reasons_of(v4)
    assert "rows: the mosaic_gpu kernel reads FP8_V4 latents of 448 + 64 values only" in text
    assert "these have 384 + 128" in text
    assert "implementation=None" in text
    packed = to_bytes(quantize(jnp.zeros((3, 7, 512)), KVLayout.FP8_V4), page_bytes=7 * 584)
    paged = from_bytes(packed, KVLayout.FP8_V4, page_size=7, in_place=True)
    text = reasons_of(paged)
    assert "multiple of 16 bytes: cache.packed.shape=(3, 4088)" in text
    empty = BF16Rows(jnp.zeros((0, 64, 576), jnp.bfloat16), rank=512, rope_dim=64)
    text = reasons_of(rows, extra_rows=empty, extra_indices=indices)
    assert "extra_rows: the mosaic_gpu kernel expects at least one slot: " in text
    assert "; rows:" not in text and ": rows:" not in text
    text = reasons_of(rows, q=Q(0, 0, 1, 3), indices=indices[:0])
    assert "q.shape=(0, 1, 3, 576): the mosaic_gpu kernel expects at least one query" in text
    assert "at least one slot: cache.shape=(0, 64)" in reasons_of(empty)


def test_the_stand_in_agrees_with_the_reference(calls):
    q, rows = Q(0, 2, 2, 3), rows_of(BF16, 1, 3, 7)
    indices = random_indices(2, 2, 2, 9, slots=21).at[0, 0].set(-1)
    wanted = sparse_decode(
        q, rows, indices, sm_scale=SCALE, attn_sink=SINK, implementation="reference"
    )
    ours = decode(q, rows, indices, attn_sink=SINK)
    assert_close(ours[0], wanted[0], abs_tol=1e-3, rel_tol=8e-3)
    assert_close(ours[1], wanted[1], abs_tol=1e-5, rel_tol=1e-5)
    same_bits(ours[0][0, 0], jnp.zeros((3, 512), jnp.bfloat16))
