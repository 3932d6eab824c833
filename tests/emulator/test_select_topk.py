"""Blocks of the top-k kernel on emulated devices against the plain sort of the jnp path."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from tests.emulator.kernels import kernels
from tests.selection.rows import KINDS, rows_of_kind

call = kernels().modules["select_topk.call"]
tuning = kernels().modules["select_topk.tuning"]
shape = kernels().modules["select_topk.shape"]

RESIDENT = tuning.Resident(threads=128, vectors=2, capacity=0)
SAMPLED = tuning.Resident(threads=128, vectors=4, capacity=640)
FILTERED = tuning.Filtered(threads=128, blocks=1, vectors=2, capacity=640, sampled=1)


def select(
    scores: np.ndarray, lengths: Any, k: int, how: Any, starts: Any = None, **options: Any
) -> np.ndarray:
    starts = None if starts is None else np.asarray(starts, np.int32)
    lengths = np.asarray(lengths, np.int32)
    return call.select_topk(scores, lengths, k, starts=starts, tuning=how, **options)


def expected(scores: np.ndarray, lengths: Any, k: int, starts: Any = None) -> np.ndarray:
    return np.asarray(
        jmla.select_topk(
            jnp.asarray(scores),
            jnp.asarray(lengths, jnp.int32),
            k,
            row_starts=None if starts is None else jnp.asarray(starts, jnp.int32),
            implementation="xla",
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_registers(kind: str):
    scores = rows_of_kind(kind, 2, 1000)
    lengths, starts = [999, 400], [1, 203]
    got = select(scores, lengths, 130, RESIDENT, starts)
    np.testing.assert_array_equal(got, expected(scores, lengths, 130, starts))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_registers_by_a_sample(kind: str):
    scores = rows_of_kind(kind, 1, 2048)
    got = select(scores, [2047], 70, SAMPLED, [1])
    np.testing.assert_array_equal(got, expected(scores, [2047], 70, [1]))


@pytest.mark.parametrize("kind", KINDS)
def test_filtered_rows(kind: str):
    """The second row is short enough to be kept whole."""
    scores = rows_of_kind(kind, 2, 2100)
    lengths = [2093, 600]
    got = select(scores, lengths, 70, FILTERED, [2, 301])
    np.testing.assert_array_equal(got, expected(scores, lengths, 70, [2, 301]))


@pytest.mark.parametrize("how", [RESIDENT, FILTERED], ids=["registers", "filtered"])
def test_columns_that_four_does_not_divide(how: Any):
    scores = rows_of_kind("ties", 2, 251 if how is RESIDENT else 1021)
    lengths = [scores.shape[1], 200]
    got = select(scores, lengths, 33, how, [0, 47])
    np.testing.assert_array_equal(got, expected(scores, lengths, 33, [0, 47]))


@pytest.mark.parametrize("how", [RESIDENT, FILTERED], ids=["registers", "filtered"])
def test_lengths_around_k(how: Any):
    lengths = [-5, 0, 1, 8, 9, 10, 900]
    scores = rows_of_kind("special", len(lengths), 64)
    got = select(scores, lengths, 9, how)
    np.testing.assert_array_equal(got, expected(scores, lengths, 9))


def test_slots_of_pages():
    scores = rows_of_kind("normal", 4, 256)
    lengths = [256, 20, 0, 250]
    table = np.random.default_rng(1).permutation(3 * 40).reshape(3, 40).astype(np.int32)
    table[:, 3::5] = -1
    table[1, 1::7] = 2**31 - 1
    requests = np.array([2, 1, 0, 3], np.int32)
    pages = shape.PagedSlots(page_size=5, requests=3, max_pages=40, own_request=False)
    operands = {"page_table": table, "requests": requests}
    got = select(scores, lengths, 50, RESIDENT, conversion=pages, operands=operands)
    positions = jnp.asarray(expected(scores, lengths, 50))
    slots = jmla.paged_indices(
        positions, jnp.asarray(table), page_size=5, requests=jnp.asarray(requests)
    )
    np.testing.assert_array_equal(got, slots)


def test_rows_of_a_ragged_buffer():
    scores, lengths = rows_of_kind("normal", 3, 256), [256, 20, 0]
    offsets = np.array([7, 0, 1000], np.int32)
    operands = {"offsets": offsets}
    got = select(scores, lengths, 50, RESIDENT, conversion=shape.RaggedRows(), operands=operands)
    positions = jnp.asarray(expected(scores, lengths, 50))
    np.testing.assert_array_equal(got, jmla.ragged_indices(positions, jnp.asarray(offsets)))
