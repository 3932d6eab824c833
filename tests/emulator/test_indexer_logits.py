"""Blocks of the kernel of index logits on emulated devices against f64."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jmla import _mosaic_logits
from tests.emulator.kernels import kernels
from tests.selection.index_cases import Case, paged, ragged

modules = kernels().modules
call, shapes, tuning = (modules[f"indexer_logits.{name}"] for name in ("call", "shape", "tuning"))


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each has many tiles."""
    monkeypatch.setattr(tuning, "MULTIPROCESSORS", 3)


def check(case: Case, **how: Any) -> None:
    given, operands = _mosaic_logits.arguments(case.queries, case.keys)
    keys = shapes.Keys(**dataclasses.asdict(given.keys))
    shape = shapes.Shape(**{**vars(given), "keys": keys})
    chosen = dataclasses.replace(tuning.choose(shape), stages=3, **how)
    arrays = {name: np.asarray(each) for name, each in operands.items()}
    got = call.indexer_logits(shape, arrays, tuning=chosen)
    wanted = case.expected()
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


def test_pages_of_leaves():
    check(paged([[700], [0], [130], [-3], [1000]], max_pages=10))


def test_pages_of_another_engine_and_two_queries():
    check(paged([[256, 257], [0, 640]], max_pages=10, form="packed", missing=3))


def test_pages_of_any_size_heads_of_any_number_and_sets_of_queries():
    ends = [[90, 91, 92, 93, 94], [300, 0, 17, 260, 1]]
    check(paged(ends, max_pages=31, page_size=10, heads=37, dim=64, missing=2))


def test_windows_of_one_buffer():
    starts = [0, -5, 300, 20, 7, 0, 200]
    ends = [390, 130, 200, 21, 1 << 30, 0, 391]
    check(ragged(starts, ends, 391, heads=64))


def test_windows_of_few_heads():
    rng = np.random.default_rng(0)
    starts, ends = rng.integers(-50, 400, 40), rng.integers(0, 600, 40)
    check(ragged(starts, ends, 513, heads=4))


def test_turns_of_a_set():
    starts, ends = [0, 0, 0], [600, 500, 610]
    check(ragged(starts, ends, 640, heads=20), sets=2, scorers=4, queries=1)
