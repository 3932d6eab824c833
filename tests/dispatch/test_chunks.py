"""The rule of chunked prefill: every query attends to stored rows, its own chunk's included.

So the same prompt gives the same results however it is chunked, and a decode step those of prefill.
"""

import pytest

from jmla.layouts.base import KVLayout
from tests.dispatch.chunk_cases import decoded, prefilled, prompt_of
from tests.dispatch.plan_cases import plan_of
from tests.helpers import assert_close

CHUNKINGS = ((1, 64, 64), (64, 64, 1), (43, 43, 43))


@pytest.mark.parametrize(
    ("layout", "backend", "transform"),
    [
        (KVLayout.BF16, "flashmla_sparse", "PAGED"),
        (KVLayout.BF16, "flashmla", "PAGE_TABLE"),
        (KVLayout.FP8_NOPE_FP8_ROPE, "flashmla_kv", "PAGED"),
        (KVLayout.FP8_NOPE_FP8_ROPE, "flashmla_sparse", "RAGGED"),
        (KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE, "flashmla_kv", "PAGED"),
        (KVLayout.FP4, "flashmla_sparse", "RAGGED"),
        (KVLayout.FP8_V4, "flashmla_sparse", "RAGGED"),
    ],
)
def test_a_prompt_gives_the_same_however_it_is_chunked(
    layout: KVLayout, backend: str, transform: str
) -> None:
    plan = plan_of(layout, prefill_backend=backend)
    assert plan.prefill.index_transform == transform
    prompt = prompt_of(plan, 129, 48)
    out, lse, cache = prefilled(plan, prompt, (129,))
    for chunks in CHUNKINGS:
        mine = prefilled(plan, prompt, chunks)
        assert_close(mine[0], out, abs_tol=1e-3, rel_tol=2.01 / 128)
        assert_close(mine[1], lse, abs_tol=1e-5, rel_tol=1e-6)
    if transform != "PAGE_TABLE":
        for token in (0, 70, 128):
            step = decoded(plan, prompt, cache, token)
            assert_close(step[0], out[token], abs_tol=1e-3, rel_tol=2.01 / 128)
            assert_close(step[1], lse[token], abs_tol=1e-5, rel_tol=1e-6)
