"""Logits and their selection in two launches on emulated devices against a stable sort."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jmla import _mosaic_logits
from tests.emulator.kernels import kernels
from tests.selection.index_cases import Case, paged

modules = kernels().modules
call, joining, keeping = (modules[f"indexer_topk.{name}"] for name in ("call", "join", "keep"))
shapes, tuning = (modules[f"indexer_logits.{name}"] for name in ("shape", "tuning"))
topk = modules["select_topk.shape"]


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few blocks that each has many tiles, and buffers that are often full."""
    monkeypatch.setattr(tuning, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(call, "_THREADS", 128)
    for module in (call, joining, keeping, modules["indexer_topk.shape"]):
        monkeypatch.setattr(module, "CAPACITY", 768)


def check(case: Case, k: int, *, slots: bool = False) -> None:
    given, operands = _mosaic_logits.arguments(case.queries, case.keys)
    shape = shapes.Shape(**{**vars(given), "keys": shapes.Keys(**dataclasses.asdict(given.keys))})
    chosen = dataclasses.replace(tuning.choose(shape), stages=4)
    arrays = {name: np.asarray(each) for name, each in operands.items()}
    logits = modules["indexer_logits.call"].indexer_logits(shape, arrays, tuning=chosen)
    lengths = np.clip(np.asarray(case.queries.ends[:, 0]), 0, shape.columns)
    wanted = np.full((shape.requests, k), -1, np.int32)
    for row, length, out in zip(logits, lengths, wanted, strict=True):
        order = np.argsort(-row[:length], kind="stable")[:k]
        out[: len(order)] = np.sort(order)
    conversion: Any = None
    if slots:
        table = arrays["page_table"]
        size = shape.keys.page_size
        conversion = topk.PagedSlots(size, *table.shape, own_request=True)
        pages = np.take_along_axis(table, np.maximum(wanted, 0) // size, axis=1)
        there = (wanted >= 0) & (pages >= 0) & (pages < (2**31 - 1) // size)
        wanted = np.where(there, pages.astype(np.int64) * size + wanted % size, -1)
    got = call.indexer_topk(shape, arrays, k, conversion=conversion, tuning=chosen)
    np.testing.assert_array_equal(got, wanted)


def test_slots_of_windows_of_all_lengths():
    ends = [[1500], [0], [100], [101], [-3], [700]]
    check(paged(ends, max_pages=24, heads=8), 100, slots=True)


def test_positions_of_equal_scores():
    """All logits are 0: the first tokens win."""
    case = paged([[2200], [1900]], max_pages=35, heads=8)
    queries = case.queries._replace(weights=case.queries.weights * 0)
    check(dataclasses.replace(case, queries=queries), 120)


@pytest.mark.parametrize("room", [512, 8192])
def test_more_candidates_than_registers_hold(monkeypatch: pytest.MonkeyPatch, room: int):
    monkeypatch.setattr(joining, "_HELD", 128)
    monkeypatch.setattr(joining, "_ROOM", room)
    check(paged([[4000], [3990]], max_pages=63, heads=8, form="packed"), 250)
