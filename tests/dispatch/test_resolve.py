"""What a config resolves to. The tables below are written out, not read from the package."""

import dataclasses
import warnings
from typing import Any

import pytest

from jmla.config import Config, HiSparseConfig
from jmla.dispatch.resolve import alternatives, resolve, valid_pairs
from jmla.layouts.base import KVLayout
from jmla.plan import Plan

BF16 = KVLayout.BF16
RAW = KVLayout.FP8_NOPE_FP8_ROPE
BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
FP4 = KVLayout.FP4
V4 = KVLayout.FP8_V4

READS = {
    "prefill": {
        "flashmla_sparse": {BF16, RAW, BLOCK, FP4, V4},
        "flashmla_kv": {RAW, BLOCK, V4},
        "flashmla_auto": {BF16, RAW, BLOCK, FP4, V4},
        "trtllm": {BF16, RAW},
        "fa3": {BF16},
        "flashmla": {BF16, RAW, BLOCK, FP4},
    },
    "decode": {
        "flashmla_sparse": {BF16, RAW, BLOCK, FP4, V4},
        "flashmla_kv": {BLOCK, V4},
        "trtllm": {BF16, RAW},
        "fa3": {BF16},
        "flashmla": {BF16, RAW, BLOCK, FP4},
    },
}
PREFILLS = (None, *READS["prefill"])
DECODES = (None, *READS["decode"])
STORES = {"bfloat16": {BF16}, "fp8_e4m3": {RAW, BLOCK}, "fp4_e2m1": {FP4}}
STORES["auto"] = STORES["bfloat16"] | STORES["fp8_e4m3"]
PLATFORMS = ("cpu", "sm_80", "sm_90", "sm_100", "rocm", "tpu")


def config(**changes: Any) -> Config:
    return Config(**{"num_heads": 16, "sm_scale": 0.1, "platform": "sm_90", **changes})


def plan_of(**changes: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(config(**changes))


def refusal(**changes: Any) -> str:
    with pytest.raises(ValueError) as error:
        resolve(config(**changes))
    return str(error.value)


def backends(plan: Plan) -> tuple[str, str]:
    return plan.prefill.backend, plan.decode.backend


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", STORES)
def test_every_pair_has_a_plan_that_reads_its_cache_or_a_refusal_that_helps(
    platform: str, dtype: str
) -> None:
    for prefill in PREFILLS:
        for decode in DECODES:
            settings = {
                "platform": platform,
                "kv_cache_dtype": dtype,
                "prefill_backend": prefill,
                "decode_backend": decode,
            }
            readable = set(STORES[dtype])
            if prefill:
                readable &= READS["prefill"][prefill]
            if decode:
                readable &= READS["decode"][decode]
            if dtype == "auto" and "trtllm" in (prefill, decode):
                readable -= {BLOCK}
            if not readable:
                text = refusal(**settings)
                assert repr(prefill) in text or repr(decode) in text
                assert "accepted instead:\n- " in text
                continue
            plan = plan_of(**settings)
            assert plan.layout in readable, settings
            assert plan.prefill.layout is plan.decode.layout is plan.layout
            assert plan.layout in READS["prefill"][plan.prefill.backend], settings
            assert plan.layout in READS["decode"][plan.decode.backend], settings
            assert decode in (None, plan.decode.backend)
            assert prefill in (None, "flashmla_auto", plan.prefill.backend)


@pytest.mark.parametrize(
    ("platform", "dtype", "layout", "expected"),
    [
        ("sm_90", "bfloat16", BF16, ("flashmla_sparse", "fa3")),
        ("sm_90", "auto", BF16, ("flashmla_sparse", "fa3")),
        ("sm_90", "fp8_e4m3", BLOCK, ("flashmla_kv", "flashmla_kv")),
        ("sm_90", "fp4_e2m1", FP4, ("flashmla_sparse", "flashmla_sparse")),
        ("sm_100", "bfloat16", BF16, ("flashmla_sparse", "trtllm")),
        ("sm_100", "fp8_e4m3", RAW, ("trtllm", "trtllm")),
        ("sm_100", "auto", RAW, ("trtllm", "trtllm")),
        ("sm_120", "auto", RAW, ("trtllm", "trtllm")),
        ("cpu", "auto", BF16, ("flashmla_sparse", "fa3")),
        ("cpu", "fp8_e4m3", BLOCK, ("flashmla_kv", "flashmla_kv")),
        ("rocm", "auto", BF16, ("flashmla_sparse", "fa3")),
        ("tpu", "auto", BF16, ("flashmla_sparse", "fa3")),
    ],
)
def test_defaults(platform: str, dtype: str, layout: KVLayout, expected: tuple[str, str]) -> None:
    plan = plan_of(platform=platform, kv_cache_dtype=dtype)
    assert plan.layout is layout
    assert backends(plan) == expected


@pytest.mark.parametrize("dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("platform", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        ("trtllm", None, ("trtllm", "trtllm")),
        (None, "trtllm", ("trtllm", "trtllm")),
        ("flashmla_kv", "trtllm", ("flashmla_kv", "trtllm")),
        ("flashmla_auto", "trtllm", ("flashmla_kv", "trtllm")),
        ("flashmla_sparse", "trtllm", ("flashmla_sparse", "trtllm")),
        ("trtllm", "flashmla_sparse", ("trtllm", "flashmla_sparse")),
    ],
)
def test_trtllm_in_either_phase_makes_the_cache_plain_fp8(
    dtype: str, platform: str, prefill: str | None, decode: str | None, expected: tuple[str, str]
) -> None:
    plan = plan_of(
        platform=platform, kv_cache_dtype=dtype, prefill_backend=prefill, decode_backend=decode
    )
    assert plan.layout is RAW
    assert backends(plan) == expected


def test_trtllm_keeps_a_cache_that_is_named_bfloat16() -> None:
    assert plan_of(kv_cache_dtype="bfloat16", decode_backend="trtllm").layout is BF16


def test_blackwell_keeps_block_scales_where_no_phase_is_trtllm() -> None:
    plan = plan_of(
        platform="sm_100",
        kv_cache_dtype="fp8_e4m3",
        prefill_backend="flashmla_sparse",
        decode_backend="flashmla_sparse",
    )
    assert plan.layout is BLOCK
    unnamed = plan_of(platform="sm_100", kv_cache_dtype="fp8_e4m3", prefill_backend="flashmla_kv")
    assert unnamed.layout is RAW
    assert backends(unnamed) == ("flashmla_kv", "trtllm")


def test_auto_takes_a_dtype_that_the_named_backend_reads() -> None:
    assert plan_of(platform="sm_90", decode_backend="flashmla_kv").layout is BLOCK
    assert plan_of(platform="sm_100", decode_backend="fa3").layout is BF16


@pytest.mark.parametrize(
    ("layout", "platform", "sinks", "expected"),
    [
        (BF16, "sm_90", False, "flashmla_sparse"),
        (RAW, "sm_90", False, "flashmla_kv"),
        (BLOCK, "sm_90", False, "flashmla_kv"),
        (BLOCK, "sm_100", False, "flashmla_sparse"),
        (BLOCK, "cpu", False, "flashmla_kv"),
        (FP4, "sm_90", False, "flashmla_sparse"),
        (V4, "sm_90", False, "flashmla_kv"),
        (BLOCK, "sm_90", True, "flashmla_sparse"),
    ],
)
def test_flashmla_auto_is_a_function_of_layout_platform_and_sinks(
    layout: KVLayout, platform: str, sinks: bool, expected: str
) -> None:
    plan = plan_of(
        layout=layout,
        platform=platform,
        attn_sink=sinks,
        kv_lora_rank=448 if layout is V4 else 512,
        prefill_backend="flashmla_auto",
        decode_backend="flashmla_sparse",
    )
    assert plan.prefill.backend == expected
    assert f"flashmla_auto stands for {expected}" in plan.prefill.reasons[0]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("layout", KVLayout)
def test_decode_is_the_same_whatever_prefill_is_named(
    platform: str, decode: str | None, layout: KVLayout
) -> None:
    """First historical bug: decode looked at the prefill setting for its index transform."""
    if decode is not None and layout not in READS["decode"][decode]:
        return
    rank = 448 if layout is V4 else 512
    plans = [
        plan_of(
            platform=platform,
            layout=layout,
            kv_lora_rank=rank,
            prefill_backend=prefill,
            decode_backend=decode,
        ).decode
        for prefill in PREFILLS
        if prefill is None or layout in READS["prefill"][prefill]
    ]
    assert len({(plan, plan.reasons) for plan in plans}) == 1
    plan = plans[0]
    dense = plan.backend == "flashmla"
    assert plan.index_transform == ("PAGE_TABLE" if dense else "PAGED")


@pytest.mark.parametrize("prefill", PREFILLS)
def test_prefill_is_the_same_whatever_decode_is_named(prefill: str | None) -> None:
    """Second historical bug: flashmla_auto became flashmla_kv because a decode batch had run."""
    for layout in KVLayout:
        if prefill is not None and layout not in READS["prefill"][prefill]:
            continue
        rank = 448 if layout is V4 else 512
        plans = [
            plan_of(
                layout=layout, kv_lora_rank=rank, prefill_backend=prefill, decode_backend=decode
            ).prefill
            for decode in DECODES
            if decode is None or layout in READS["decode"][decode]
        ]
        assert len({(plan, plan.reasons) for plan in plans}) == 1


@pytest.mark.parametrize(
    ("layout", "prefill", "transform", "reads"),
    [
        (BF16, "flashmla_sparse", "PAGED", "direct"),
        (RAW, "flashmla_sparse", "RAGGED", "gather_dequantize"),
        (BLOCK, "flashmla_sparse", "RAGGED", "gather_dequantize"),
        (FP4, "flashmla_sparse", "RAGGED", "gather_dequantize"),
        (BLOCK, "flashmla_kv", "PAGED", "direct"),
        (RAW, "flashmla_kv", "PAGED", "convert"),
        (BF16, "fa3", "PAGED", "direct"),
        (RAW, "trtllm", "PAGED", "direct"),
        (BF16, "flashmla", "PAGE_TABLE", "direct"),
        (FP4, "flashmla", "PAGE_TABLE", "gather_dequantize"),
    ],
)
def test_the_index_transform_of_prefill(
    layout: KVLayout, prefill: str, transform: str, reads: str
) -> None:
    plan = plan_of(layout=layout, prefill_backend=prefill, decode_backend="flashmla_sparse")
    assert (plan.prefill.index_transform, plan.prefill.reads) == (transform, reads)
    assert plan.decode.index_transform == "PAGED"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("platform", ["sm_90", "sm_100"])
def test_attention_sinks_take_flashmla_sparse(dtype: str, platform: str) -> None:
    plan = plan_of(kv_cache_dtype=dtype, platform=platform, attn_sink=True)
    assert backends(plan) == ("flashmla_sparse", "flashmla_sparse")
    assert plan.layout is (BLOCK if dtype == "fp8_e4m3" else BF16)


@pytest.mark.parametrize("decode", ["flashmla_kv", "trtllm", "fa3", "flashmla"])
def test_attention_sinks_refuse_the_backends_without(decode: str) -> None:
    text = refusal(decode_backend=decode, attn_sink=True)
    assert f"decode_backend='{decode}' does not add attention sinks" in text
    assert "decode_backend=None or 'flashmla_sparse'" in text


@pytest.mark.parametrize(
    ("backend", "page_size", "accepted"),
    [
        ("trtllm", 32, True),
        ("trtllm", 64, True),
        ("trtllm", 128, False),
        ("flashmla", 64, True),
        ("flashmla", 32, False),
        ("fa3", 1, True),
        ("flashmla_sparse", 53, True),
    ],
)
def test_page_sizes(backend: str, page_size: int, accepted: bool) -> None:
    settings = {"decode_backend": backend, "page_size": page_size, "kv_cache_dtype": "bfloat16"}
    if accepted:
        assert plan_of(**settings).decode.backend == backend
    else:
        text = refusal(**settings)
        assert f"page_size={page_size}" in text
        assert "- page_size=64" in text


def test_a_default_never_asks_for_another_page_size() -> None:
    for platform in PLATFORMS:
        for dtype in STORES:
            plan_of(platform=platform, kv_cache_dtype=dtype, page_size=53)


@pytest.mark.parametrize(
    "name",
    [
        "tilelang",
        "aiter",
        "triton",
        "triton_sparse_mla",
        "cutlass_mla",
        "flashinfer",
        "flashinfer_sparse_mla",
        "fa4",
        "trtllm_mla",
        "flashmla_sparse_q8",
    ],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_names_of_the_serving_engines_are_refused_by_name(name: str, phase: str) -> None:
    text = refusal(**{f"{phase}_backend": name, "kv_cache_dtype": "bfloat16"})
    assert f"{phase}_backend='{name}' is a backend of the serving engines" in text
    assert "the nearest is" in text
    assert f"- {phase}_backend=None, 'flashmla_sparse'" in text


def test_unknown_names_and_wrong_phases() -> None:
    assert "'flashmla_spares' is not a known backend: expected" in refusal(
        prefill_backend="flashmla_spares"
    )
    assert "'flashmla_auto' serves prefill only: expected" in refusal(
        decode_backend="flashmla_auto"
    )


def test_every_unmet_requirement_is_told_at_once() -> None:
    text = refusal(
        attention="mha",
        kv_cache_dtype="fp8_e4m3",
        prefill_backend="tilelang",
        decode_backend="trtllm",
        page_size=16,
        attn_sink=True,
        implementation="mosaic_gpu",
        hisparse=HiSparseConfig(device_buffer_size=16),
    )
    for reason in (
        "attention='mha'",
        "prefill_backend='tilelang' is a backend of the serving engines",
        "pages of 32 or 64",
        "does not add attention sinks",
        "decode_backend='trtllm' does not serve hisparse",
        "hisparse.device_buffer_size=16",
    ):
        assert reason in text, reason


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_dtype": "fp8_e4m3", "decode_backend": "fa3"},
        {
            "kv_cache_dtype": "fp8_e4m3",
            "prefill_backend": "trtllm",
            "decode_backend": "flashmla_kv",
        },
        {"kv_cache_dtype": "bfloat16", "layout": FP4},
        {"decode_backend": "trtllm", "page_size": 16},
        {"kv_cache_dtype": "fp8_e4m3", "kv_lora_rank": 448},
        {"kv_cache_dtype": "fp8_e4m3", "hisparse": HiSparseConfig(), "decode_backend": "trtllm"},
    ],
)
def test_every_proposed_value_is_accepted(settings: dict[str, Any]) -> None:
    lines = alternatives(config(**settings))
    assert lines
    proposed = 0
    for line in lines:
        name, _, values = line.partition("=")
        for value in values.replace(" or ", ", ").split(", "):
            new = eval(value, {"KVLayout": KVLayout})
            assert plan_of(**{**settings, name: new})
            proposed += 1
    assert proposed > 1 or len(lines) == 1
    assert "\n".join(f"- {line}" for line in lines) in refusal(**settings)


def test_changes_that_are_needed_together_are_proposed_together() -> None:
    settings = {"decode_backend": "tilelang", "attention": "mha"}
    assert alternatives(config(**settings)) == ("decode_backend=None and attention='mla' together",)


def test_a_pinned_layout() -> None:
    plan = plan_of(layout=RAW, prefill_backend="flashmla_sparse", decode_backend="flashmla_sparse")
    assert plan.layout is RAW
    text = refusal(layout=RAW, kv_cache_dtype="bfloat16")
    assert "stores 'fp8_e4m3'" in text
    assert "kv_cache_dtype='auto' or 'fp8_e4m3'" in text


def test_a_layout_that_the_sizes_do_not_allow() -> None:
    text = refusal(kv_cache_dtype="fp8_e4m3", kv_lora_rank=448)
    assert "128 to divide kv_lora_rank=448" in text
    assert "KVLayout.FP8_V4" in text
    assert plan_of(layout=V4, kv_lora_rank=448).layout is V4
    assert "rope_dim=8" in refusal(kv_cache_dtype="fp4_e2m1", rope_dim=8)
    assert plan_of(platform="sm_100", kv_lora_rank=100, page_size=16).layout is not BLOCK


def test_an_implementation_is_passed_on() -> None:
    assert plan_of(implementation="reference").decode.implementation == "reference"
    assert plan_of().decode.implementation is None


def test_auto_platform_is_the_platform_of_this_machine() -> None:
    import jax

    plan = plan_of(platform="auto")
    if jax.default_backend() == "gpu":
        assert plan.platform == "rocm" or plan.platform.startswith("sm_")
    else:
        assert plan.platform == jax.default_backend()
    assert plan.config.platform == "auto"


def test_a_plan_is_hashable_and_equal_by_value() -> None:
    assert plan_of() == plan_of()
    assert len({plan_of(), plan_of(), plan_of(num_splits=2)}) == 2
    assert dataclasses.replace(plan_of(), warnings=("x",)) != plan_of()


def test_the_explanation_tells_choices_reasons_and_bytes() -> None:
    text = str(
        plan_of(kv_cache_dtype="fp8_e4m3", prefill_backend="flashmla_auto", decode_backend="trtllm")
    )
    for part in (
        "sm_90 (Hopper)",
        "16 query heads",
        "FP8_NOPE_FP8_ROPE",
        "708 bytes per token and layer (576 latent + 132 index key)",
        "decode_backend='trtllm' cannot read",
        "flashmla_auto stands for flashmla_kv",
        "reads FP8_NOPE_FP8_ROPE rows in place",
        "named by decode_backend='trtllm'",
        "runs on the device kernel for sm_90 (Hopper)",
    ):
        assert part in " ".join(text.split()), part
    assert "\nprefill  flashmla_kv, PAGED indices, reads: direct\n" in text
    assert max(map(len, text.splitlines())) <= 130


def test_a_dense_plan_keeps_no_index_keys() -> None:
    dense = plan_of(
        kv_cache_dtype="bfloat16", prefill_backend="flashmla", decode_backend="flashmla"
    )
    assert dense.index_dim is None
    assert "1152 bytes per token" in str(dense)
    assert plan_of(prefill_backend="flashmla", kv_cache_dtype="bfloat16").index_dim == 128


def test_valid_pairs_are_those_that_resolve() -> None:
    config = Config(num_heads=16, sm_scale=0.1, layout=KVLayout.FP8_NOPE_FP8_ROPE, platform="cpu")
    pairs = valid_pairs(config)
    assert ("flashmla_kv", "trtllm") in pairs and ("flashmla_sparse", "trtllm") in pairs
    assert ("trtllm", "flashmla_kv") not in pairs and ("fa3", "trtllm") not in pairs
    for prefill, decode in pairs:
        plan = resolve(dataclasses.replace(config, prefill_backend=prefill, decode_backend=decode))
        assert plan.layout is KVLayout.FP8_NOPE_FP8_ROPE
