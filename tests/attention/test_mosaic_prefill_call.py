"""The call of prefill through the Hopper kernels, on any machine: a stand-in takes their place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla import _implementation, _mosaic_prefill
from jmla.attention import sparse_prefill
from jmla.layouts import BF16Rows, KVLayout
from tests.attention.cases import SCALE, random_indices, random_queries, random_rows
from tests.attention.exact import (
    BF16,
    FORMATS,
    FP4,
    PAGED_V4,
    POW2,
    V4,
    relative_error,
    rows_of,
)
from tests.attention.stand_in import stand_in
from tests.helpers import assert_close

kernels = pytest.importorskip("pallas_kernels.sparse_prefill", reason="needs Pallas for GPUs")

SINK = jnp.array([0.5, -jnp.inf, jnp.inf], jnp.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The shape of the queries and the format of each call that was traced."""
    traced: list[tuple[Any, ...]] = []

    def recorded(q, keys, **options):
        traced.append((q.shape, keys.format))
        out, lse, top = stand_in(q, [keys], **options, with_max_logits=True)
        return out, top, lse

    monkeypatch.setattr(kernels, "sparse_prefill", recorded)
    # Another function has a cache of its own, so that no later call gets the stand-in.
    monkeypatch.setattr(
        _mosaic_prefill, "_compiled", jax.jit(lambda *args: _mosaic_prefill._attend(*args))
    )
    return traced


def prefill(q, rows, indices, **options):
    return sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="mosaic_gpu", **options)


def assert_results(ours, wanted) -> None:
    assert_close(ours[0], wanted[0], abs_tol=4e-3, rel_tol=2.01 / 128)
    for mine, theirs in zip(ours[1:], wanted[1:], strict=True):
        assert_close(mine, theirs, abs_tol=1e-2, rel_tol=1e-3)  # keys rounded to bf16


@pytest.mark.parametrize("form", [*FORMATS, FP4, V4, PAGED_V4])
@pytest.mark.parametrize("lengths", [None, [4, 0, 100, 9, 1, -3]])
def test_arguments_reach_the_kernel_and_results_come_back_in_order(calls, form, lengths):
    rows, indices = rows_of(form, 1, 3, 7), random_indices(2, 6, 9, slots=21)
    q = random_queries(0, 6, 3, width=rows.width)
    options = {
        "topk_length": None if lengths is None else jnp.array(lengths, jnp.int32),
        "attn_sink": SINK,
    }
    ours = prefill(q, rows, indices, **options)
    wanted = sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="reference", **options)
    assert_results(ours, wanted)
    assert [shape for shape, _ in calls] == [(6, 3, rows.width)]


@pytest.mark.parametrize(
    ("names", "queries"), [("q", 12), ("q indices lengths", 12), ("rows", 4), ("sink", 4)]
)
def test_vmap(calls, names: str, queries: int):
    makers = {
        "q": lambda seed: random_queries(seed, 4, 3, width=576),
        "rows": lambda seed: rows_of(BF16, seed, 3, 7),
        "indices": lambda seed: random_indices(seed, 4, 9, slots=21),
        "lengths": lambda seed: jnp.array([seed, 9 - seed, 3, 9], jnp.int32),
        "sink": lambda seed: SINK + np.float32(seed),
    }
    batched = [name in names.split() for name in makers]
    args = [
        jax.tree.map(lambda *x: jnp.stack(x), *map(make, range(3))) if moves else make(1)
        for make, moves in zip(makers.values(), batched, strict=True)
    ]

    def one(q, rows, indices, lengths, sink):
        return prefill(q, rows, indices, topk_length=lengths, attn_sink=sink)

    ours = jax.vmap(one, in_axes=[0 if moves else None for moves in batched])(*args)
    assert calls[-1] == ((queries, 3, 576), "bf16")
    for i in range(3):
        mine = [
            jax.tree.map(lambda x, i=i: x[i], arg) if moves else arg
            for arg, moves in zip(args, batched, strict=True)
        ]
        assert_results(jax.tree.map(lambda x, i=i: x[i], ours), one(*mine))


def test_derivatives_are_those_of_xla(calls):
    q, rows = random_queries(0, 4, 3, width=576), rows_of(BF16, 1, 3, 7)
    indices, sink = random_indices(2, 4, 9, slots=21), jnp.array([0.5, -1.0, 2.0], jnp.float32)
    lengths = jnp.array([9, 4, 1, 9], jnp.int32)

    def loss(implementation, scale, sink):
        out, top, lse = sparse_prefill(
            q,
            rows,
            indices,
            sm_scale=scale,
            topk_length=lengths,
            attn_sink=sink,
            implementation=implementation,
        )
        return (out.astype(jnp.float32) ** 2).sum() + top.sum() + lse.sum()

    gradient = jax.grad(loss, argnums=(1, 2))
    args = (jnp.float32(SCALE), sink)
    wanted, ours = gradient("xla", *args), gradient("mosaic_gpu", *args)
    assert calls, "the primal results are the kernel's"
    for mine, theirs in zip(ours, wanted, strict=True):
        assert bool(jnp.any(theirs != 0))
        assert_close(mine, theirs, abs_tol=2e-2, rel_tol=1e-2)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_gradients_of_rows_and_queries_against_f32(calls, implementation):
    """Rows that most queries name: sums in bf16 would lose what is small beside the sum."""
    n, slots, topk = 256, 32, 16
    keys = jax.random.split(jax.random.key(0), 3)
    q = (0.3 * jax.random.normal(keys[0], (n, 2, 576))).astype(jnp.bfloat16)
    latents = jax.random.normal(keys[1], (slots, 576)).astype(jnp.bfloat16)
    weights = 0.3 + jax.random.normal(keys[2], (n, 2, 512))
    indices = random_indices(2, n, topk, slots=slots, bad=0)

    def loss(q, latents):
        rows = BF16Rows(latents, rank=512, rope_dim=64)
        out, _, lse = sparse_prefill(
            q, rows, indices, sm_scale=0.1352, implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32) * weights) + lse.sum()

    def exact(q, latents):
        keys = latents[indices]
        logits = 0.1352 * jnp.einsum("nhd,nkd->nhk", q, keys, precision="highest")
        p = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("nhk,nkd->nhd", p, keys[..., :512], precision="highest")
        return jnp.sum(out * weights) + jax.nn.logsumexp(logits, axis=-1).sum()

    wanted = jax.grad(exact, argnums=(0, 1))(q.astype(jnp.float32), latents.astype(jnp.float32))
    for mine, theirs in zip(jax.grad(loss, argnums=(0, 1))(q, latents), wanted, strict=True):
        assert mine.dtype == jnp.bfloat16
        ours = np.asarray(mine, np.float64)
        assert relative_error(ours, np.asarray(theirs, np.float64)) < 5e-3
    assert bool(calls) == (implementation == "mosaic_gpu")


def test_none_takes_the_kernel_on_hopper_alone(calls, monkeypatch):
    q, rows = random_queries(0, 2, 3, width=576), rows_of(POW2, 1, 3, 7)
    indices = random_indices(2, 2, 9, slots=21)
    for hopper in (False, True):
        monkeypatch.setattr(_implementation, "on_hopper", lambda hopper=hopper: hopper)
        sparse_prefill(q, rows, indices, sm_scale=SCALE)
        assert bool(calls) == hopper
    sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="xla")
    sparse_prefill(q[:0], rows, indices[:0], sm_scale=SCALE)
    sparse_prefill(q[..., :192], random_rows(1, 3, 7), indices, sm_scale=SCALE)
    assert len(calls) == 1


def test_every_reason_against_the_kernel_is_told():
    empty = BF16Rows(jnp.zeros((0, 192), jnp.bfloat16), rank=128, rope_dim=64)
    with pytest.raises(NotImplementedError) as error:
        prefill(jnp.zeros((0, 3, 192), jnp.bfloat16), empty, jnp.zeros((0, 4), jnp.int32))
    text = str(error.value)
    assert "q.shape=(0, 3, 192): the mosaic_gpu kernel expects at least one query" in text
    assert "reads BF16 latents of 512 + 64 values only, and these have 128 + 64" in text
    assert "expects at least one slot" in text


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"layout": KVLayout.BF16}, "bf16"),
        ({"layout": KVLayout.FP8_NOPE_FP8_ROPE, "prefill_backend": "flashmla_sparse"}, "bf16"),
        ({"layout": KVLayout.FP8_NOPE_FP8_ROPE, "prefill_backend": "trtllm"}, "fp8"),
        ({"layout": KVLayout.FP4}, "fp4"),
        ({"layout": KVLayout.FP4, "prefill_backend": "flashmla_sparse"}, "bf16"),
    ],
)
def test_a_plans_prefill_reaches_the_kernel(calls, monkeypatch, settings: Any, form: str):
    """RAGGED plans with the gathered rows, PAGED ones with the cache."""
    monkeypatch.setattr(_implementation, "on_hopper", lambda: True)
    resolved = jmla.resolve(jmla.Config(num_heads=3, sm_scale=0.1, platform="sm_90", **settings))
    cache = resolved.init_cache(2)
    lengths = jnp.array([5], jnp.int32)
    batch = jmla.make_batch(
        lengths, lengths, jnp.zeros((1, 1), jnp.int32), num_tokens=5, page_size=64
    )
    try:
        q = random_queries(0, 5, 3, width=576)
        resolved.prefill(q, cache, batch, jnp.zeros((5, 7), jnp.int32))
    finally:
        jax.clear_caches()  # the plan's own jit holds the stand-in
    assert calls == [((5, 3, 576), form)]
    assert resolved.prefill.reasons[-1].startswith("runs on the device kernel for sm_90 (Hopper)")
