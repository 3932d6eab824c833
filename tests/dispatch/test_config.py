import dataclasses
import math

import pytest

from jmla.config import Config, HiSparseConfig
from jmla.layouts.base import KVLayout


def config(**changes: object) -> Config:
    return Config(**{"num_heads": 4, "sm_scale": 0.1, **changes})  # type: ignore[arg-type]


def test_a_config_is_hashable_and_equal_by_value() -> None:
    assert len({config(), config(), config(page_size=32)}) == 2


def test_sm_scale_is_required() -> None:
    with pytest.raises(TypeError, match="sm_scale"):
        Config(num_heads=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("alias", "name"), [("bf16", "bfloat16"), ("fp4_mx_block16", "fp4_e2m1"), ("auto", "auto")]
)
def test_aliases_of_the_serving_engines(alias: str, name: str) -> None:
    assert config(kv_cache_dtype=alias) == config(kv_cache_dtype=name)
    assert config(kv_cache_dtype=alias).kv_cache_dtype == name


def test_replace_keeps_a_config_valid() -> None:
    changed = dataclasses.replace(config(kv_cache_dtype="bf16", sm_scale=1), page_size=3)
    assert changed.kv_cache_dtype == "bfloat16"
    assert changed.page_size == 3
    assert isinstance(changed.sm_scale, float)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_heads", 0, "at least 1"),
        ("num_heads", 2.0, "whole number"),
        ("num_heads", True, "whole number"),
        ("sm_scale", math.nan, "finite"),
        ("sm_scale", math.inf, "finite"),
        ("sm_scale", 0, "positive"),
        ("sm_scale", "0.1", "number"),
        ("kv_cache_dtype", "fp16", "'auto', 'bfloat16', 'fp8_e4m3' or 'fp4_e2m1'"),
        ("kv_cache_dtype", "nvfp4", "block scales"),
        ("kv_cache_dtype", "mxfp4", "blocks of 32"),
        ("kv_cache_dtype", "fp8_e5m2", "mantissa"),
        ("kv_cache_dtype", None, "'auto'"),
        ("layout", "FP4", "KVLayout.FP4"),
        ("prefill_backend", 3, "name of a backend"),
        ("decode_backend", KVLayout.FP4, "name of a backend"),
        ("page_size", 0, "at least 1"),
        ("index_topk", -1, "at least 1"),
        ("kv_lora_rank", 0, "at least 1"),
        ("rope_dim", -1, "at least 0"),
        ("scale_format", "e8m0", "'pow2' or 'fp32'"),
        ("attention", "gqa", "'mla' or 'mha'"),
        ("index_head_dim", 0, "None or a whole number"),
        ("attn_sink", 1.0, "True or False"),
        ("hisparse", {"top_k": 3}, "HiSparseConfig"),
        ("platform", "hopper", "sm_90"),
        ("platform", "sm_9.0", "sm_90"),
        ("implementation", "triton", "None, 'xla', 'mosaic_gpu' or 'reference'"),
        ("num_splits", 0, "None or a whole number"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_accepted(field: str, value: object, says: str) -> None:
    with pytest.raises(ValueError) as error:
        config(**{field: value})
    assert field in str(error.value)
    assert says in str(error.value)


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        config(num_heads=0, page_size=0, platform="hopper", scale_format="int8")
    for field in ("num_heads=0", "page_size=0", "platform='hopper'", "scale_format='int8'"):
        assert field in str(error.value)


def test_hisparse_sizes() -> None:
    assert HiSparseConfig().buffer_rows(2048) == 4096
    assert HiSparseConfig(device_buffer_size=6144).buffer_rows(2048) == 6144
    with pytest.raises(ValueError, match=r"swap_in_block_size=1025: expected 1 to 1024"):
        HiSparseConfig(swap_in_block_size=1025)
    with pytest.raises(ValueError, match=r"device_buffer_size=2047: expected at least"):
        HiSparseConfig(top_k=2048, device_buffer_size=2047)
    with pytest.raises(ValueError) as error:
        HiSparseConfig(top_k=0, host_to_device_ratio=0)
    assert "top_k" in str(error.value)
    assert "host_to_device_ratio" in str(error.value)
