"""FP4 caches: each rule with what the serving engine did in the same place."""

import warnings
from typing import Any

import pytest

from jmla.config import Config
from jmla.dispatch.fp4 import FP4CompatibilityError, FP4CompatibilityWarning
from jmla.dispatch.resolve import resolve
from jmla.layouts.base import KVLayout
from jmla.plan import Plan


def config(**changes: Any) -> Config:
    sizes = {"num_heads": 16, "sm_scale": 0.1, "platform": "sm_90", "kv_cache_dtype": "fp4_e2m1"}
    return Config(**{**sizes, **changes})


def refusal(**changes: Any) -> str:
    with pytest.raises(FP4CompatibilityError) as error:
        resolve(config(**changes))
    return str(error.value)


@pytest.mark.parametrize("backend", ["flashmla", "flashmla_sparse"])
def test_one_backend_in_both_phases_does_not_warn(backend: str) -> None:
    """flashmla: in the engine's first list, added by hand, and out of today's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = resolve(config(prefill_backend=backend, decode_backend=backend))
    assert plan.layout is KVLayout.FP4
    assert plan.warnings == ()


def test_a_name_that_picks_is_not_a_mixed_pair() -> None:
    plan = resolve(config(prefill_backend="flashmla_auto", decode_backend="flashmla_sparse"))
    assert plan.prefill.backend == plan.decode.backend


@pytest.mark.parametrize(
    ("prefill", "decode"), [("flashmla", "flashmla_sparse"), ("flashmla_sparse", "flashmla")]
)
def test_a_mixed_pair_that_works_warns_and_names_both(prefill: str, decode: str) -> None:
    """The engine warns here too, but names both after having checked neither."""
    with pytest.warns(FP4CompatibilityWarning) as caught:
        plan: Plan = resolve(config(prefill_backend=prefill, decode_backend=decode))
    (warning,) = plan.warnings
    assert str(caught[0].message) == warning
    assert f"{prefill!r} prefill" in warning
    assert f"{decode!r} decode" in warning
    assert warning.split()[-1] in str(plan)


@pytest.mark.parametrize(
    ("prefill", "decode", "unable"),
    [
        ("fa3", "triton", ("prefill_backend='fa3'", "decode_backend='triton'")),
        ("fa3", "flashmla", ("prefill_backend='fa3'",)),
        ("flashmla", "trtllm", ("decode_backend='trtllm'",)),
        ("flashmla_sparse", "flashmla_kv", ("decode_backend='flashmla_kv'",)),
        ("flashmla_kv", "trtllm", ("prefill_backend='flashmla_kv'", "decode_backend='trtllm'")),
    ],
)
def test_a_mixed_pair_that_cannot_work_is_refused(
    prefill: str, decode: str, unable: tuple[str, ...]
) -> None:
    """The engine let every mixed pair through, with a warning that problems were improbable."""
    text = refusal(prefill_backend=prefill, decode_backend=decode)
    for setting in unable:
        assert f"{setting} cannot read an FP4 cache with MLA: expected 'flashmla_sparse'" in text
    assert text.count("cannot read an FP4 cache") == len(unable)


@pytest.mark.parametrize("backend", ["fa3", "trtllm", "flashmla_kv"])
def test_one_backend_that_cannot_read_fp4_is_refused(backend: str) -> None:
    assert f"prefill_backend='{backend}'" in refusal(prefill_backend=backend)
    assert f"decode_backend='{backend}'" in refusal(decode_backend=backend)


def test_fa4_in_both_phases_is_refused_as_it_was() -> None:
    text = refusal(prefill_backend="fa4", decode_backend="fa4")
    assert "behind fa4 prefill is 'flashinfer' or 'trtllm_mla': 'fa4' is not in it" in text


def test_names_from_the_engines_list_are_told_apart() -> None:
    assert "'trtllm_mla' is in it, but jmla does not serve" in refusal(decode_backend="trtllm_mla")
    assert "'cutlass_mla' was in it once" in refusal(decode_backend="cutlass_mla")


def test_mha_has_lists_and_a_config_of_its_own() -> None:
    text = refusal(attention="mha", decode_backend="triton")
    assert "'triton', 'torch_native', 'flex_attention' or 'trtllm_mha'" in text
    assert "'trtllm_mha'" in refusal(attention="mha")
    assert "attention='mla'" in refusal(attention="mha")


@pytest.mark.parametrize("platform", ["cpu", "rocm", "tpu"])
def test_kernels_are_refused_off_cuda_and_xla_is_not(platform: str) -> None:
    """The engine refuses FP4 off CUDA altogether: it has nothing there that could read it."""
    text = refusal(platform=platform, implementation="mosaic_gpu")
    assert "reads FP4 on CUDA only" in text
    assert "implementation=None, 'xla' or 'reference'" in text
    for implementation in (None, "xla", "reference"):
        plan = resolve(config(platform=platform, implementation=implementation))
        assert plan.layout is KVLayout.FP4


def test_a_pinned_layout_has_the_same_rules() -> None:
    text = refusal(kv_cache_dtype="auto", layout=KVLayout.FP4, decode_backend="fa3")
    assert "decode_backend='fa3' cannot read an FP4 cache" in text


def test_the_plan_says_that_fp4_costs_accuracy() -> None:
    text = " ".join(str(resolve(config())).split())
    assert "324 latent" in text
    assert "cost accuracy" in text
