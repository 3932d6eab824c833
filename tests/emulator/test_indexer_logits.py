"""Blocks of the kernel of index logits on emulated devices against f64."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jmla import _mosaic_logits
from jmla._mosaic_logits import NONE_FORCED, Forced
from tests.emulator.kernels import kernels
from tests.selection.index_cases import Case, paged, ragged

modules = kernels().modules
call, shapes, tuning = (modules[f"indexer_logits.{name}"] for name in ("call", "shape", "tuning"))


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each has many tiles."""
    monkeypatch.setattr(tuning, "MULTIPROCESSORS", 3)


def check(case: Case, forced: Forced = NONE_FORCED, **how: Any) -> None:
    given, operands = _mosaic_logits.arguments(case.queries, case.keys, forced)
    keys = shapes.Keys(**dataclasses.asdict(given.keys))
    shape = shapes.Shape(**{**vars(given), "keys": keys})
    chosen = dataclasses.replace(tuning.choose(shape), stages=3, **how)
    arrays = {name: np.asarray(each) for name, each in operands.items()}
    got = call.indexer_logits(shape, arrays, tuning=chosen)
    wanted = case.expected()
    starts = case.queries.starts
    first = np.zeros_like(case.queries.ends) if starts is None else np.maximum(starts, 0)
    end = np.minimum(case.queries.ends, wanted.shape[-1])
    position, first, end = np.arange(wanted.shape[-1]), first[..., None], end[..., None]
    within = (position >= first) & (position < end)
    at_ends = (position < first + forced.first) | (position >= end - forced.last)
    wanted[within & at_ends] = np.inf
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


def test_pages_of_leaves():
    check(paged([[700], [0], [130], [-3], [1000]], max_pages=10))


def test_pages_of_another_engine_and_two_queries():
    check(paged([[256, 257], [0, 640]], max_pages=10, form="packed", missing=3))


def test_pages_of_any_size_heads_of_any_number_and_sets_of_queries():
    ends = [[90, 91, 92, 93, 94], [300, 0, 17, 260, 1]]
    check(paged(ends, max_pages=31, page_size=10, heads=37, dim=64, missing=2))


def test_forced_tokens():
    """Also where the cache has no page, and in windows that are shorter."""
    check(paged([[300, 4], [0, 640]], max_pages=10, heads=4, missing=2), Forced(3, 70))
    check(ragged([0, 200, -5], [130, 390, 7], 391, heads=4), Forced(0, 9))


@pytest.mark.parametrize("dim", [64, 128])
def test_keys_in_bf16(dim: int):
    ends = [[300, 301], [0, 7], [640, 64]]
    check(paged(ends, max_pages=10, form="bf16", heads=20, dim=dim, missing=2))


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
