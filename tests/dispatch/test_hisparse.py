"""HiSparse: which backend serves which dtype, and what its sizes must be."""

import re
from typing import Any

import pytest

from jmla.config import Config, HiSparseConfig
from jmla.dispatch.resolve import resolve
from jmla.layouts.base import KVLayout

BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE


def config(**changes: Any) -> Config:
    sizes = {"num_heads": 16, "sm_scale": 0.1, "platform": "sm_90", "hisparse": HiSparseConfig()}
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


def test_other_dtypes_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError) as error:
        resolve(config(kv_cache_dtype="fp4_e2m1"))
    assert (
        "hisparse does not take kv_cache_dtype='fp4_e2m1': expected 'auto', 'bfloat16' or "
        "'fp8_e4m3'"
    ) in str(error.value)
    with pytest.raises(ValueError, match=r"hisparse does not take layout=KVLayout.FP8_NOPE_FP8"):
        resolve(config(layout=KVLayout.FP8_NOPE_FP8_ROPE))


def test_sinks_and_fp8_cannot_be_had_together() -> None:
    with pytest.raises(ValueError, match="expected kv_cache_dtype='bfloat16'"):
        resolve(config(kv_cache_dtype="fp8_e4m3", attn_sink=True))


def test_the_buffer_holds_a_step() -> None:
    assert resolve(config(hisparse=HiSparseConfig(device_buffer_size=2048)))
    with pytest.raises(ValueError, match=r"device_buffer_size=2047: expected at least index_topk"):
        resolve(config(hisparse=HiSparseConfig(device_buffer_size=2047)))


def test_there_is_no_cache_for_it_yet() -> None:
    with pytest.raises(NotImplementedError, match="hisparse=None"):
        resolve(config()).init_cache(4)
