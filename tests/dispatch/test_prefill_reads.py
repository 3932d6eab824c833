"""How a prefill that nobody has named reads a cache of few bits, and how its plan says so."""

import jax
import numpy as np
import pytest

from jmla import _prefill_reads
from jmla.layouts.base import KVLayout
from jmla.phase_plan import PrefillPlan
from tests.dispatch.chunk_cases import prefilled, prompt_of
from tests.dispatch.plan_cases import plan_of as small_plan_of
from tests.dispatch.test_resolve import BF16, BLOCK, FP4, RAW, V4, plan_of
from tests.helpers import assert_close

LONG, SHORT = (4096, 2048, 32768), (4, 2048, 32768)


@pytest.mark.parametrize("layout", [BLOCK, RAW, FP4])
@pytest.mark.parametrize("named", [None, "flashmla_auto"])
def test_many_heads_of_many_tokens_read_copies(layout: KVLayout, named: str | None) -> None:
    prefill = plan_of(layout=layout, num_heads=128, prefill_backend=named).prefill
    assert (prefill.reads, prefill.index_transform) == ("fastest", "PAGED")
    assert prefill.reads_of(*LONG) == "gather_dequantize"
    assert prefill.reads_of(*SHORT) == "direct"
    said = " ".join(prefill.reasons)
    for room in (32768, 131072):
        least = _prefill_reads.first_gathering(layout, 128, 2048, room)
        assert least is not None and f"{least} " in said and f"for {room}" in said
        assert prefill.reads_of(least, 2048, room) == "gather_dequantize"
        assert prefill.reads_of(least - 1, 2048, room) == "direct"


@pytest.mark.parametrize("layout", [BLOCK, RAW, FP4, V4])
def test_few_heads_read_the_rows_in_place(layout: KVLayout) -> None:
    rank = 448 if layout is V4 else 512
    prefill = plan_of(layout=layout, num_heads=16, kv_lora_rank=rank).prefill
    assert (prefill.reads, prefill.index_transform) == ("direct", "PAGED")


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"layout": BLOCK, "prefill_backend": "flashmla_kv"}, "direct"),
        ({"layout": BLOCK, "prefill_backend": "flashmla_sparse"}, "gather_dequantize"),
        ({"layout": RAW, "prefill_backend": "flashmla_kv"}, "convert"),
        ({"layout": BLOCK, "platform": "cpu"}, "direct"),
        ({"layout": FP4, "platform": "sm_100"}, "gather_dequantize"),
        ({"layout": BLOCK, "implementation": "xla"}, "direct"),
        ({"layout": BLOCK, "rope_dim": 128}, "direct"),
        ({"layout": BF16}, "direct"),
        ({"layout": V4, "kv_lora_rank": 448}, "direct"),
    ],
)
def test_what_is_named_or_has_no_choice_stays(settings, reads: str) -> None:
    prefill = plan_of(**{"num_heads": 128, **settings}).prefill
    assert prefill.reads == reads == prefill.reads_of(*LONG)


def test_copies_take_no_more_memory_than_the_queries() -> None:
    assert _prefill_reads.gathers(BLOCK, 128, 4096, 2048, 128 * 4096)
    assert not _prefill_reads.gathers(BLOCK, 128, 4096, 2048, 128 * 4096 + 64)


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where a plan never chooses: the same plan, told to."""
    plan = small_plan_of(BLOCK)
    prompt = prompt_of(plan, 129, 48)
    fields = {name: getattr(plan.prefill, name) for name in PrefillPlan.__dataclass_fields__}
    results = []
    for gathers in (False, True):
        monkeypatch.setattr(_prefill_reads, "gathers", lambda *_, g=gathers: g)
        jax.clear_caches()
        prefill = PrefillPlan(**{**fields, "reads": "fastest"})
        _, _, cache = prefilled(plan, prompt, (129,))
        batch = prompt.batch(129, 129, plan.config.page_size)
        results.append(prefill(prompt.q, cache, batch, prompt.positions))
    assert_close(np.asarray(results[0][0]), results[1][0], abs_tol=1e-3, rel_tol=2.01 / 128)
    assert_close(results[0][1], results[1][1], abs_tol=1e-5, rel_tol=1e-6)
