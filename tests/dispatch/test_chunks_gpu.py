"""The rule of chunked prefill through the Hopper kernels, and decode steps behind it."""

import itertools
from typing import Any

import numpy as np
import pytest

from jmla.config import Config
from jmla.dispatch.resolve import resolve
from jmla.layouts.base import KVLayout
from jmla.plan import Plan
from tests.attention.exact import relative_error
from tests.dispatch.chunk_cases import decoded, prefilled, prompt_of
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("hopper")

LENGTH, TOPK = 600, 256
# In blocks of prefill's own, in parts of decode's, and a request that grows token by token.
CHUNKINGS = ((256, 256, 88), (1, 599), (520, *[16] * 5))
BLOCK = KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE
RAW = KVLayout.FP8_NOPE_FP8_ROPE
ROUNDING = 3.5e-3  # of two results of one token: twice that of bf16, and some


def plan_of(layout: KVLayout, heads: int, **changes: Any) -> Plan:
    return resolve(
        Config(
            num_heads=heads,
            sm_scale=0.1352,
            layout=layout,
            index_topk=TOPK,
            index_head_dim=None,
            kv_lora_rank=layout.default_rank,
            **changes,
        )
    )


def close(ours: tuple[np.ndarray, ...], others: tuple[np.ndarray, ...]) -> None:
    assert_close(ours[0], others[0], abs_tol=4e-3, rel_tol=2.01 / 128, cos_tol=1.5e-5)
    assert relative_error(ours[0], np.asarray(others[0], np.float64)) <= ROUNDING
    assert_close(ours[1], others[1], abs_tol=2e-3, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (KVLayout.BF16, {}),
        (BLOCK, {}),
        (BLOCK, {"prefill_backend": "flashmla_sparse"}),
        (RAW, {}),
        (RAW, {"prefill_backend": "flashmla_kv"}),
        (RAW, {"prefill_backend": "flashmla_sparse", "decode_backend": "trtllm"}),
        (KVLayout.FP4, {}),
        (KVLayout.FP8_V4, {}),
    ],
)
@pytest.mark.parametrize("heads", [16, 128])
def test_a_prompt_gives_the_same_however_it_is_chunked(layout, options, heads: int):
    """And a decode step, whatever its backend, what prefill gives at its position."""
    plan = plan_of(layout, heads, **options)
    prompt = prompt_of(plan, LENGTH, TOPK)
    out, lse, cache = prefilled(plan, prompt, (LENGTH,))
    for chunks in CHUNKINGS if heads == 128 else CHUNKINGS[:1]:
        close(prefilled(plan, prompt, chunks)[:2], (out, lse))
    for token in (0, 1, 70, 255, LENGTH - 1):
        close(decoded(plan, prompt, cache, token), (out[token], lse[token]))


def test_all_ways_to_read_a_cache_agree():
    for layout in (BLOCK, RAW):
        results = []
        for backend in (None, "flashmla_kv", "flashmla_sparse", "flashmla_auto"):
            plan = plan_of(layout, 64, prefill_backend=backend)
            prompt = prompt_of(plan, LENGTH, TOPK)
            results.append(prefilled(plan, prompt, (LENGTH,))[:2])
        for mine, others in itertools.pairwise(results):
            close(mine, others)
