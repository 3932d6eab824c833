"""Both implementations against outputs of FlashMLA's own fp32 reference, at its tolerances."""

from typing import get_args

import pytest

from jmla.attention import Implementation, sparse_decode, sparse_prefill
from tests.attention.cases import DECODE_FILES, PREFILL_FILES, golden_decode, golden_prefill
from tests.helpers import assert_close

IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference")


def test_every_implementation_is_either_tested_here_or_a_kernel():
    assert set(get_args(Implementation)) == {*IMPLEMENTATIONS, "mosaic_gpu"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DECODE_FILES)
def test_sparse_decode(name: str, implementation: Implementation):
    case = golden_decode(name)
    out, lse = sparse_decode(*case.args, **case.kwargs, implementation=implementation)
    assert_close(out, case.expected["out"], abs_tol=1e-3, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(lse, case.expected["lse"], abs_tol=1e-6, rel_tol=8.01 / 65536)


@pytest.mark.parametrize("name", DECODE_FILES)
def test_sparse_decode_in_splits(name: str):
    case = golden_decode(name)
    out, lse = sparse_decode(*case.args, **case.kwargs, num_splits=3, implementation="xla")
    assert_close(out, case.expected["out"], abs_tol=1e-3, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(lse, case.expected["lse"], abs_tol=1e-6, rel_tol=8.01 / 65536)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PREFILL_FILES)
def test_sparse_prefill(name: str, implementation: Implementation):
    case = golden_prefill(name)
    out, max_logits, lse = sparse_prefill(*case.args, **case.kwargs, implementation=implementation)
    assert_close(out, case.expected["out"], abs_tol=8e-4, rel_tol=3.01 / 128, cos_tol=7e-6)
    assert_close(max_logits, case.expected["max_logits"], abs_tol=1e-6, rel_tol=2.01 / 65536)
    assert_close(lse, case.expected["lse"], abs_tol=1e-6, rel_tol=2.01 / 65536)


def test_the_golden_files_hold_the_cases_that_matter():
    """Empty rows, infinite sinks, a second cache, lengths, both widths, out-of-range indices."""
    decodes = [golden_decode(name) for name in DECODE_FILES]
    prefills = [golden_prefill(name) for name in PREFILL_FILES]
    sinks = [case.kwargs["attn_sink"] for case in decodes]
    assert any((case.expected["lse"] == float("-inf")).any() for case in decodes + prefills)
    assert any((sink == float("inf")).any() for sink in sinks)
    assert any((sink == float("-inf")).any() for sink in sinks)
    assert any("extra_indices" in case.kwargs for case in decodes)
    assert any("topk_length" in case.kwargs for case in decodes)
    assert {case.args[0].shape[-1] for case in decodes + prefills} == {512, 576}
    assert any((case.args[2] >= case.args[1].num_slots).any() for case in prefills)
