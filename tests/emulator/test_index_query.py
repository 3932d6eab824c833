"""The kernel of index queries on emulated blocks, bit for bit."""

import dataclasses

import numpy as np
import pytest

from tests.emulator.kernels import kernels
from tests.selection.query_cases import CASES, Case

modules = kernels().modules
call, shapes = modules["index_query.call"], modules["index_query.shape"]


@pytest.mark.parametrize("case", CASES)
def test_queries(case: Case):
    raw = case.draw()
    operands = {"q": np.asarray(raw.values), "weights": np.asarray(raw.weights)}
    if case.rope_dim:
        operands |= {"cos": np.asarray(raw.cos), "sin": np.asarray(raw.sin)}
    codes, weights = call.index_query(shapes.Shape(**dataclasses.asdict(case)), operands)
    wanted_codes, wanted_weights = case.expected(raw)
    nan = wanted_codes & 0x7F == 0x7F
    np.testing.assert_array_equal(codes.view(np.uint8)[~nan], wanted_codes[~nan])
    assert (codes.view(np.uint8)[nan] & 0x7F == 0x7F).all()
    np.testing.assert_array_equal(weights, wanted_weights)
