"""Plans run end to end on a small cache, against attention written out in numpy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.batch import BatchMeta, make_batch
from jmla.cache import Cache
from jmla.config import Config
from jmla.dispatch.resolve import resolve
from jmla.layouts.base import KVLayout
from jmla.plan import Plan
from jmla.topk import identity_topk
from tests.dispatch.plan_cases import (
    ALL,
    HEADS,
    PAGE,
    RANK,
    ROPE,
    SINK,
    check,
    decode_case,
    expected,
    expected_decode,
    expected_prefill,
    filled,
    plan_of,
    prefill_case,
    queries,
    readers,
    run_decode,
    run_prefill,
)
from tests.helpers import assert_close


@pytest.mark.parametrize("layout", KVLayout)
def test_all_pairs_over_one_cache_agree_with_the_reference(layout: KVLayout) -> None:
    """Everything is selected, so that dense and sparse backends compute the same."""
    cache = filled(layout)
    prefills, decodes = readers(layout)
    assert len(prefills) >= 3
    assert len(decodes) >= 2
    scale = plan_of(layout).config.sm_scale
    prefilled, decoded = expected_prefill(cache, ALL, scale), expected_decode(cache, ALL, scale)
    for prefill in prefills:
        for decode in decodes:
            plan = plan_of(layout, prefill_backend=prefill, decode_backend=decode)
            check(run_prefill(plan.prefill, cache, ALL), prefilled)
            check(run_decode(plan.decode, cache, ALL), decoded)


@pytest.mark.parametrize("layout", KVLayout)
def test_sparse_pairs_attend_to_the_selection_only(layout: KVLayout) -> None:
    cache = filled(layout)
    prefills, decodes = readers(layout)
    scale = plan_of(layout).config.sm_scale
    prefilled, decoded = expected_prefill(cache, 16, scale), expected_decode(cache, 16, scale)
    for prefill in prefills:
        if prefill != "flashmla":
            plan = plan_of(layout, prefill_backend=prefill)
            check(run_prefill(plan.prefill, cache, 16), prefilled)
    for decode in decodes:
        if decode != "flashmla":
            plan = plan_of(layout, decode_backend=decode)
            check(run_decode(plan.decode, cache, 16), decoded)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "prefill", "decode"),
    [
        ("fp8_e4m3", "flashmla_kv", "trtllm"),
        ("fp8_e4m3", "flashmla_auto", "trtllm"),
        ("fp8_e4m3", "flashmla_sparse", "trtllm"),
        ("fp8_e4m3", "flashmla_sparse", "flashmla_kv"),
        ("fp8_e4m3", "flashmla_auto", "flashmla_kv"),
        ("bfloat16", "flashmla_sparse", "fa3"),
        ("bfloat16", "flashmla_auto", "fa3"),
    ],
)
def test_a_prompt_and_steps_from_the_dtype_alone(
    kv_cache_dtype: str, prefill: str, decode: str
) -> None:
    """The mixes that serving engines lack or lacked, without a pinned layout: both old bugs.

    flashmla_sparse prefill over an FP8 cache crashed in decode, and flashmla_auto worked only
    because a decode batch before it had changed what it stood for. So a decode step runs first,
    and its bits are the same afterwards.
    """
    plan = resolve(
        Config(
            num_heads=HEADS,
            sm_scale=0.09,
            kv_cache_dtype=kv_cache_dtype,
            prefill_backend=prefill,
            decode_backend=decode,
            kv_lora_rank=RANK,
            rope_dim=ROPE,
            index_head_dim=None,
            platform="sm_90",
        )
    )
    raw = decode == "trtllm"
    assert (plan.layout is KVLayout.FP8_NOPE_FP8_ROPE) == raw
    cache = filled(plan.layout)
    before = run_decode(plan.decode, cache, 16)
    check(run_prefill(plan.prefill, cache, 16), expected_prefill(cache, 16, 0.09))
    after = run_decode(plan.decode, cache, 16)
    check(after, expected_decode(cache, 16, 0.09))
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("layout", [KVLayout.BF16, KVLayout.FP8_NOPE_FP8_ROPE])
def test_attention_sinks(layout: KVLayout) -> None:
    cache = filled(layout)
    plan = plan_of(layout, attn_sink=True)
    sink = jnp.asarray(SINK)
    batch, positions = prefill_case(16)
    requests, lengths = np.asarray(batch.token_request), np.asarray(batch.lengths)
    got = plan.prefill(queries(140), cache, batch, positions, attn_sink=sink)
    reference = expected(
        cache, queries(140), requests, lengths, np.asarray(positions), 0.09, sink=SINK
    )
    check(got, reference)

    batch, positions = decode_case(16)
    requests, lengths = np.asarray(batch.token_request), np.asarray(batch.lengths)
    q = queries(3, 2, seed=3)
    got = plan.decode(q, cache, batch, positions, attn_sink=sink)
    flat = q.reshape(6, HEADS, -1)
    check(got, expected(cache, flat, requests, lengths, np.asarray(positions), 0.09, sink=SINK))


def test_positions_after_a_token_are_not_attended_to() -> None:
    """They may lie on pages that the table does not have: its tail is garbage."""
    plan = plan_of(KVLayout.BF16)
    cache = filled(KVLayout.BF16)
    for k in (16, ALL):
        batch, positions = decode_case(k)
        beyond = jnp.where(positions < 0, 250, positions)
        got = plan.decode(queries(3, 2, seed=3), cache, batch, beyond)
        check(got, expected_decode(cache, k, 0.09))
    batch, positions = prefill_case(ALL)
    beyond = jnp.where(positions < 0, 140, positions)
    got = plan.prefill(queries(140), cache, batch, beyond)
    check(got, expected_prefill(cache, ALL, 0.09))


def test_convert_leaves_pages_alone_that_the_batch_does_not_touch() -> None:
    """Compiled, the copies are as many pages as the page table has, not as the cache has."""
    plan = plan_of(
        KVLayout.FP8_NOPE_FP8_ROPE, prefill_backend="flashmla_kv", decode_backend="trtllm"
    )
    batch, positions = prefill_case(16)
    big = jax.eval_shape(lambda: plan.init_cache(100_000))
    compiled = jax.jit(plan.prefill).lower(queries(140), big, batch, positions).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 64 << 20 < 100_000 * PAGE * (RANK + ROPE)


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_a_plan_is_static_inside_an_outer_jit_and_compiles_once(call: str) -> None:
    traces = []

    def step(plan: Plan, cache: Cache, q: jax.Array, batch: BatchMeta, positions: jax.Array) -> Any:
        traces.append(plan)
        phase = plan.prefill if call == "prefill" else plan.decode
        return phase(q, cache, batch, positions)

    jitted: Callable[..., Any] = jax.jit(step, static_argnums=0)
    case, q = (prefill_case, queries(140)) if call == "prefill" else (decode_case, queries(3, 2))
    batch, positions = case(16)
    cache = filled(KVLayout.FP4)
    first = jitted(plan_of(KVLayout.FP4), cache, q, batch, positions)
    second = jitted(plan_of(KVLayout.FP4), cache, q, batch, positions)
    assert len(traces) == 1
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_an_exported_decode_step_gives_the_same_bits() -> None:
    plan, cache = plan_of(KVLayout.BF16), filled(KVLayout.BF16)
    batch, positions = decode_case(16)
    q = queries(3, 2, seed=3)

    def step(
        q: jax.Array, rows: list[jax.Array], meta: list[jax.Array], positions: jax.Array
    ) -> Any:
        return plan.decode(
            q,
            jax.tree.unflatten(jax.tree.structure(cache), rows),
            jax.tree.unflatten(jax.tree.structure(batch), meta),
            positions,
        )

    args = (q, jax.tree.leaves(cache), jax.tree.leaves(batch), positions)
    exported = jax.export.export(jax.jit(step))(*args)
    for a, b in zip(exported.call(*args), plan.decode(q, cache, batch, positions), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("layout", KVLayout)
def test_vmap_over_independent_caches(layout: KVLayout) -> None:
    plan = plan_of(layout, prefill_backend="flashmla_auto")
    cache = filled(layout)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache)
    batch, positions = prefill_case(16)
    q = jnp.stack([queries(140), queries(140, seed=9)])
    outs, lses = jax.vmap(lambda q, c: plan.prefill(q, c, batch, positions))(q, two)
    for i in range(2):
        out, lse = plan.prefill(q[i], cache, batch, positions)
        assert_close(outs[i], out, abs_tol=1e-3, rel_tol=2.01 / 128)
        assert_close(lses[i], lse, abs_tol=1e-5, rel_tol=1e-6)


def test_heads_over_two_devices_give_the_same_bits() -> None:
    """Each device runs a plan of its own number of heads; the cache is on all of them."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    layout = KVLayout.FP8_NOPE_FP8_ROPE
    cache = filled(layout)
    batch, positions = decode_case(16)
    q = jnp.concatenate([queries(3, 2, seed=3), queries(3, 2, seed=4)], axis=2)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    by_head = jax.sharding.PartitionSpec(None, None, "heads")
    everywhere = jax.sharding.PartitionSpec()
    sharded = jax.shard_map(
        plan_of(layout).decode,
        mesh=mesh,
        in_specs=(by_head, everywhere, everywhere, everywhere),
        out_specs=(by_head, by_head),
    )
    whole = plan_of(layout, num_heads=2 * HEADS).decode(q, cache, batch, positions)
    for a, b in zip(jax.jit(sharded)(q, cache, batch, positions), whole, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("backend", ["flashmla_sparse", "flashmla_kv", "flashmla"])
def test_empty_batches(backend: str) -> None:
    plan = plan_of(
        KVLayout.FP8_NOPE_FP8_ROPE, prefill_backend=backend, decode_backend="flashmla_sparse"
    )
    cache = plan.init_cache(2)
    empty = make_batch(
        jnp.zeros(0, jnp.int32),
        jnp.zeros(0, jnp.int32),
        jnp.zeros((0, 4), jnp.int32),
        num_tokens=0,
        page_size=PAGE,
    )
    out, lse = plan.prefill(queries(0), cache, empty, jnp.zeros((0, 8), jnp.int32))
    assert out.shape == (0, HEADS, RANK)
    assert lse.shape == (0, HEADS)
    out, lse = plan.decode(queries(0, 2), cache, empty, jnp.zeros((0, 8), jnp.int32))
    assert out.shape == (0, 2, HEADS, RANK)
    assert lse.shape == (0, 2, HEADS)


def test_dense_backends_take_no_positions_and_sparse_ones_need_them() -> None:
    layout = KVLayout.BF16
    dense = plan_of(layout, prefill_backend="flashmla", decode_backend="flashmla")
    sparse = plan_of(layout)
    cache = filled(layout)
    batch, _ = decode_case(16)
    check(
        dense.decode(queries(3, 2, seed=3), cache, batch, None), expected_decode(cache, ALL, 0.09)
    )
    with pytest.raises(ValueError, match=r"positions=None: fa3 decode expects int32 \[6, k\]"):
        sparse.decode(queries(3, 2), cache, batch, None)
    with pytest.raises(ValueError, match=r"positions.shape=\(3, 8\): .*int32 \[6, k\]"):
        sparse.decode(queries(3, 2), cache, batch, identity_topk(jnp.zeros(3, jnp.int32), 8))


def test_arguments_that_do_not_fit_the_plan_are_refused() -> None:
    plan, cache = plan_of(KVLayout.BF16), filled(KVLayout.BF16)
    batch, positions = decode_case(16)
    q = queries(3, 2)
    with pytest.raises(ValueError, match=r"expects \[3, 2, 3, width\]"):
        plan.decode(q[:, :, :2], cache, batch, positions)
    with pytest.raises(ValueError, match=r"expects \[6, 3, width\]"):
        plan.prefill(q, cache, batch, positions)
    with pytest.raises(ValueError, match=r"the plan reads BF16"):
        plan.decode(q, filled(KVLayout.FP4), batch, positions)
    with pytest.raises(ValueError, match=r"batch.page_size=32: the plan was resolved"):
        plan.decode(q, cache, dataclasses.replace(batch, page_size=32), positions)
    with pytest.raises(ValueError, match=r"attn_sink is an array: .*attn_sink=False"):
        plan.decode(q, cache, batch, positions, attn_sink=jnp.zeros(HEADS))
    with pytest.raises(ValueError, match=r"attn_sink is None: .*attn_sink=True"):
        plan_of(KVLayout.BF16, attn_sink=True).decode(q, cache, batch, positions)


@pytest.mark.parametrize("backend", ["flashmla_sparse", "flashmla"])
def test_the_named_implementation_and_splits_reach_the_ops(backend: str) -> None:
    """Seen in what is traced, as they change rounding only."""
    both = {"prefill_backend": backend, "decode_backend": backend}
    cache = filled(KVLayout.BF16)

    def traced(**changes: Any) -> tuple[str, str]:
        plan = plan_of(KVLayout.BF16, **both, **changes)
        prefill = jax.make_jaxpr(plan.prefill)(queries(140), cache, *prefill_case(16))
        decode = jax.make_jaxpr(plan.decode)(queries(3, 2), cache, *decode_case(16))
        return str(prefill), str(decode)

    xla, reference = traced(), traced(implementation="reference")
    assert xla[0] != reference[0]
    assert xla[1] != reference[1]
    if backend == "flashmla_sparse":
        split = traced(num_splits=3)
        assert xla[0] == split[0]
        assert xla[1] != split[1]


def test_the_scale_format_of_the_cache() -> None:
    layout = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
    formats = [
        plan_of(layout, scale_format=scale_format).init_cache(1).rows
        for scale_format in ("pow2", "fp32")
    ]
    pow2, fp32 = (str(jax.tree.structure(rows)) for rows in formats)
    assert pow2 != fp32
    assert "fp32 scales" in str(plan_of(layout, scale_format="fp32"))


@pytest.mark.parametrize("layout", KVLayout)
def test_the_cache_is_the_plans(layout: KVLayout) -> None:
    plan = plan_of(layout, index_head_dim=128, page_size=5)
    cache = plan.init_cache(3)
    assert cache.layout is layout
    assert (cache.num_pages, cache.page_size) == (3, 5)
    per_token = layout.bytes_per_token(RANK, ROPE) + 128 + 4
    assert f"{per_token} bytes per token" in str(plan)
    assert cache.bytes_per_token == per_token
