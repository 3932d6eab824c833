"""HiSparse: which backend serves which dtype, what its sizes must be, and what its plan does."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import hisparse
from jmla.batch import make_batch
from jmla.cache import append
from jmla.config import Config, HiSparseConfig
from jmla.dispatch.resolve import resolve
from jmla.hisparse import HiSparsePool, admit, assign_pages
from jmla.layouts.base import KVLayout
from tests.layouts.cases import u16

BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE


SPARSE = "flashmla_sparse"


def config(**changes: Any) -> Config:
    sizes: dict[str, Any] = {
        "num_heads": 16,
        "sm_scale": 0.1,
        "platform": "sm_90",
        "hisparse": HiSparseConfig(),
    }
    return Config(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("platform", "settings", "layout", "backend"),
    [
        ("sm_90", {"kv_cache_dtype": "bfloat16"}, KVLayout.BF16, "flashmla_sparse"),
        ("sm_90", {"kv_cache_dtype": "fp8_e4m3"}, BLOCK, "flashmla_kv"),
        ("sm_100", {"kv_cache_dtype": "fp8_e4m3"}, BLOCK, "flashmla_kv"),
        ("sm_90", {}, KVLayout.BF16, "flashmla_sparse"),
        ("sm_100", {}, BLOCK, "flashmla_kv"),
        ("sm_90", {"decode_backend": "flashmla_kv"}, BLOCK, "flashmla_kv"),
        ("sm_100", {"decode_backend": "flashmla_sparse"}, KVLayout.BF16, "flashmla_sparse"),
        ("sm_100", {"attn_sink": True}, KVLayout.BF16, "flashmla_sparse"),
        ("sm_90", {"layout": KVLayout.FP8_NOPE_FP8_ROPE}, KVLayout.FP8_NOPE_FP8_ROPE, SPARSE),
        ("sm_90", {"kv_cache_dtype": "fp4_e2m1"}, KVLayout.FP4, SPARSE),
        ("sm_100", {"layout": KVLayout.FP4, "attn_sink": True}, KVLayout.FP4, SPARSE),
        (
            "sm_90",
            {"layout": KVLayout.FP8_V4, "kv_lora_rank": 448},
            KVLayout.FP8_V4,
            "flashmla_kv",
        ),
    ],
)
def test_each_dtype_has_its_backend(
    platform: str, settings: dict[str, Any], layout: KVLayout, backend: str
) -> None:
    plan = resolve(config(platform=platform, **settings))
    assert plan.layout is layout
    assert (plan.prefill.backend, plan.decode.backend) == (backend, backend)
    assert "4096 rows of a request on the device" in str(plan)


@pytest.mark.parametrize(
    ("dtype", "backend", "expected"),
    [
        ("bfloat16", "fa3", "'flashmla_sparse'"),
        ("bfloat16", "flashmla_kv", "'flashmla_sparse'"),
        ("fp8_e4m3", "flashmla_sparse", "'flashmla_kv'"),
        ("fp8_e4m3", "trtllm", "'flashmla_kv'"),
        ("fp8_e4m3", "tilelang", "'flashmla_kv'"),
    ],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_another_backend_is_refused_with_the_allowed_one(
    dtype: str, backend: str, expected: str, phase: str
) -> None:
    with pytest.raises(ValueError) as error:
        resolve(config(kv_cache_dtype=dtype, **{f"{phase}_backend": backend}))
    text = str(error.value)
    says = (
        f"{phase}_backend='{backend}' does not serve hisparse with kv_cache_dtype='{dtype}': "
        f"expected {expected}"
    )
    assert says in text
    assert re.search(rf"^- {phase}_backend=None or {expected}$", text, re.MULTILINE)


def test_two_allowed_backends_do_not_mix() -> None:
    with pytest.raises(ValueError, match="does not serve hisparse"):
        resolve(config(prefill_backend="flashmla_sparse", decode_backend="flashmla_kv"))


def test_the_refusal_names_the_backend_of_each_layout() -> None:
    with pytest.raises(ValueError) as error:
        resolve(config(kv_cache_dtype="fp4_e2m1", decode_backend="flashmla_kv"))
    routes = (
        "BF16 -> 'flashmla_sparse', FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE -> 'flashmla_kv', "
        "FP8_NOPE_FP8_ROPE -> 'flashmla_sparse', FP4 -> 'flashmla_sparse', FP8_V4 -> 'flashmla_kv'"
    )
    assert f"expected 'flashmla_sparse' (each layout has its own: {routes})" in str(error.value)
    with pytest.raises(ValueError, match="expected 'auto', 'bfloat16', 'fp8_e4m3' or 'fp4_e2m1'"):
        config(kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ValueError, match=r"trtllm' does not serve hisparse .* 'flashmla_sparse'"):
        resolve(config(layout=KVLayout.FP8_NOPE_FP8_ROPE, decode_backend="trtllm"))


def test_sinks_and_fp8_cannot_be_had_together() -> None:
    with pytest.raises(ValueError, match="expected kv_cache_dtype='bfloat16'"):
        resolve(config(kv_cache_dtype="fp8_e4m3", attn_sink=True))


def test_the_buffer_holds_a_step() -> None:
    assert resolve(config(hisparse=HiSparseConfig(device_buffer_size=2048)))
    with pytest.raises(ValueError, match=r"device_buffer_size=2047: expected at least index_topk"):
        resolve(config(hisparse=HiSparseConfig(device_buffer_size=2047)))


def small_config(**changes: Any) -> Config:
    sizes: dict[str, Any] = {"num_heads": 2, "index_topk": 6, "kv_lora_rank": 128, "page_size": 4}
    buffer = HiSparseConfig(device_buffer_size=12, host_to_device_ratio=5)
    sizes |= {"kv_cache_dtype": "fp8_e4m3", "hisparse": buffer, "platform": "cpu"}
    return config(**{**sizes, **changes})


def test_the_plan_sizes_and_makes_the_state() -> None:
    plan = resolve(small_config())
    sizes = plan.hisparse_sizes(requests=2, max_length=100, num_buffer_pages=8, newest=2)
    assert (sizes.num_pages, sizes.num_buffer_pages, sizes.page_size) == (40, 8, 4)
    assert (sizes.device_buffer_size, sizes.newest) == (12, 2)
    state = plan.init_hisparse(sizes)
    cache = plan.init_cache(3)
    assert (state.layout, cache.layout) == (plan.layout, plan.layout)
    assert state.index_keys is not None and cache.index_keys is not None
    form: object = jax.tree.structure(state.host_rows)
    assert form == jax.tree.structure(cache.rows)
    assert state.host_rows.shape == (40, 4) and state.buffer_rows.shape == (8, 4)
    with pytest.raises(ValueError, match=r"sizes.page_size=8: expected config.page_size=4"):
        plan.init_hisparse(dataclasses.replace(sizes, page_size=8))


def test_decode_of_the_plan_has_the_bits_of_a_plan_without_hisparse() -> None:
    plan, full_plan = (resolve(small_config(**c)) for c in ({}, {"hisparse": None}))
    sizes = plan.hisparse_sizes(requests=2, max_length=40, num_buffer_pages=8, newest=2)
    pool = HiSparsePool.empty(sizes).reserve(0, 34).reserve(1, 5)
    page_table = jnp.asarray(pool.page_table)
    state = assign_pages(plan.init_hisparse(sizes), page_table, jnp.asarray(pool.buffer_table))
    cache = plan.init_cache(sizes.num_pages)
    keys = jax.random.split(jax.random.key(0), 5)
    prompt = jnp.asarray([32, 3], jnp.int32)
    before = make_batch(prompt, prompt, page_table, num_tokens=35, page_size=4)
    rows = jax.random.normal(keys[0], (35, 192), jnp.bfloat16)
    cache = append(cache, before.write_slots, rows, rows[:, :128])
    for request, length in enumerate(prompt):
        state = admit(state, jnp.int32(request), length, cache, page_table[request])

    batch = make_batch(prompt + 2, jnp.full(2, 2, jnp.int32), page_table, num_tokens=4, page_size=4)
    new = jax.random.normal(keys[1], (4, 192), jnp.bfloat16)
    cache = append(cache, batch.write_slots, new, new[:, :128])
    state = hisparse.append(
        state, batch.seq_lens, new.reshape(2, 2, -1), new[:, :128].reshape(2, 2, -1)
    )
    # The first draft may not see the second, which is among the positions of both.
    positions = jax.random.randint(keys[2], (4, 6), -1, 34).at[:2, 0].set(33).at[2:, 0].set(4)
    q = jax.random.normal(keys[3], (2, 2, 2, 192), jnp.bfloat16)
    out, lse, after = plan.decode_hisparse(q, state, batch.seq_lens, positions)
    full_out, full_lse = full_plan.decode(q, cache, batch, positions)
    np.testing.assert_array_equal(u16(out), u16(full_out))
    np.testing.assert_array_equal(lse, full_lse)
    assert not np.array_equal(after.residency.lru, state.residency.lru)

    with pytest.raises(ValueError, match=r"expected a call of plan\.decode_hisparse"):
        plan.decode(q, cache, batch, positions)
    other = resolve(small_config(page_size=8))
    with pytest.raises(ValueError, match=r"state.page_size=4: the plan was resolved for"):
        other.decode_hisparse(q, state, batch.seq_lens, positions)
    with pytest.raises(ValueError, match=r"expects int32 \[4, k\]"):
        plan.decode_hisparse(q, state, batch.seq_lens, positions[:2])


def test_a_plan_on_the_device_has_no_host_resident_cache() -> None:
    plan = resolve(small_config(hisparse=None))
    with pytest.raises(ValueError, match=r"hisparse=None: .* expected a HiSparseConfig"):
        plan.hisparse_sizes(requests=1, max_length=4, num_buffer_pages=2)
