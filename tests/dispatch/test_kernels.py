"""Which plans a device kernel serves, and how a plan or a refusal says so."""

from typing import Any

import pytest

from jmla.dispatch.resolve import resolve
from tests.dispatch.test_resolve import BF16, BLOCK, FP4, RAW, V4, config, plan_of

RUNS = "runs on the device kernel for sm_90 (Hopper)"
NO_COPIES = f"{RUNS}, which makes no dequantised copies"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layout": BF16}, RUNS),
        ({"layout": BF16, "decode_backend": "flashmla_sparse"}, RUNS),
        ({"layout": BF16, "decode_backend": "trtllm"}, RUNS),
        ({"layout": BLOCK, "scale_format": "fp32"}, RUNS),
        ({"layout": BLOCK, "attn_sink": True}, NO_COPIES),
        ({"layout": RAW}, RUNS),
        ({"layout": RAW, "page_size": 16}, NO_COPIES),
        ({"layout": FP4}, NO_COPIES),
        ({"layout": V4, "kv_lora_rank": 448}, RUNS),
        ({"layout": V4, "kv_lora_rank": 448, "attn_sink": True}, NO_COPIES),
        ({"layout": V4}, "reads FP8_V4 latents of 448 + 64 values only, and these have 512 + 64"),
        ({"layout": BF16, "rope_dim": 32}, "these have 512 + 32"),
        ({"layout": BF16, "decode_backend": "flashmla"}, RUNS),
        ({"layout": BLOCK, "decode_backend": "flashmla"}, RUNS),
        ({"layout": FP4, "decode_backend": "flashmla"}, NO_COPIES),
        (
            {"layout": BF16, "decode_backend": "flashmla", "platform": "sm_100"},
            "no device kernel serves flashmla decode on sm_100",
        ),
        ({"layout": BF16, "platform": "sm_100"}, "no device kernel serves trtllm decode on sm_100"),
        ({"layout": BF16, "platform": "cpu"}, "no device kernel serves fa3 decode on cpu"),
        ({"layout": BF16, "implementation": "xla"}, "runs on implementation='xla', as named"),
    ],
)
def test_the_plan_says_what_runs_its_decode(settings: dict[str, Any], reason: str) -> None:
    said = plan_of(**settings).decode.reasons[-1]
    assert said == reason if reason in (RUNS, NO_COPIES) else reason in said


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layout": BF16}, RUNS),
        ({"layout": BF16, "attn_sink": True}, RUNS),
        ({"layout": BLOCK, "scale_format": "fp32"}, RUNS),
        ({"layout": BLOCK, "attn_sink": True}, RUNS),
        ({"layout": RAW, "prefill_backend": "flashmla_kv"}, RUNS),
        ({"layout": RAW, "prefill_backend": "flashmla_sparse"}, RUNS),
        ({"layout": FP4}, RUNS),
        ({"layout": V4, "kv_lora_rank": 448}, RUNS),
        ({"layout": V4, "kv_lora_rank": 448, "attn_sink": True}, RUNS),
        (
            {"layout": V4, "kv_lora_rank": 448, "prefill_backend": "flashmla_sparse"},
            "runs on XLA: no device kernel serves flashmla_sparse prefill over FP8_V4",
        ),
        ({"layout": BF16, "rope_dim": 32}, "these have 512 + 32"),
        ({"layout": BF16, "prefill_backend": "flashmla"}, RUNS),
        ({"layout": FP4, "prefill_backend": "flashmla"}, NO_COPIES),
        ({"layout": BF16, "platform": "cpu"}, "serves flashmla_sparse prefill on cpu"),
    ],
)
def test_the_plan_says_what_runs_its_prefill(settings: dict[str, Any], reason: str) -> None:
    said = plan_of(**settings).prefill.reasons[-1]
    assert said == reason if reason in (RUNS, NO_COPIES) else reason in said


def test_the_kernel_may_be_named_for_both_phases() -> None:
    for layout, rank in ((BF16, 512), (BLOCK, 512), (RAW, 512), (FP4, 512), (V4, 448)):
        plan = plan_of(layout=layout, kv_lora_rank=rank, implementation="mosaic_gpu")
        assert plan.prefill.implementation == "mosaic_gpu"
        assert plan.prefill.reasons[-1] == "runs on implementation='mosaic_gpu', as named"


def unserved(**changes: Any) -> str:
    with pytest.raises(NotImplementedError) as error:
        resolve(config(implementation="mosaic_gpu", **changes))
    return str(error.value)


def test_a_named_implementation_that_cannot_serve_is_not_implemented() -> None:
    text = unserved(layout=V4, kv_lora_rank=448, prefill_backend="flashmla_sparse")
    assert "has no kernel for flashmla_sparse prefill over FP8_V4" in text
    assert "flashmla_kv decode" not in text
    assert "implementation=None, 'xla' or 'reference'" in text
    elsewhere = "no kernel for fa3 decode on 'cpu' (platforms with one: 'sm_90')"
    assert elsewhere in unserved(platform="cpu")
    dense = "no kernel for flashmla decode on 'sm_100' (platforms with one: 'sm_90')"
    assert dense in unserved(
        platform="sm_100", kv_cache_dtype="bfloat16", decode_backend="flashmla"
    )
    assert "cannot serve flashmla_kv decode: the mosaic_gpu kernel reads FP8_V4 latents" in (
        unserved(layout=V4)
    )
    assert "cannot serve fa3 decode: the mosaic_gpu kernel reads BF16 latents of 512 + 64" in (
        unserved(kv_lora_rank=256)
    )
