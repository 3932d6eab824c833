"""The top-k kernel on a Hopper: bit for bit what a stable sort of the scores takes."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from pallas_kernels.select_topk.tuning import Filtered, Resident
from tests.selection.rows import KINDS, rows_of_kind

pytestmark = pytest.mark.usefixtures("hopper")


def keys(scores: np.ndarray) -> np.ndarray:
    """Unsigned numbers in the order of the scores, from their bits."""
    bits = scores.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    positive = (bits >> 31 == 0) | (magnitude == 0)
    ordered = np.where(positive, magnitude | np.uint32(1 << 31), ~bits)
    return np.where(magnitude > 0x7F800000, np.uint32(1), ordered)


def expected(
    scores: np.ndarray, lengths: np.ndarray, k: int, starts: np.ndarray | None
) -> np.ndarray:
    rows, columns = scores.shape
    out = np.full((rows, k), -1, np.int32)
    for i in range(rows):
        start = 0 if starts is None else min(max(int(starts[i]), 0), columns)
        length = min(max(int(lengths[i]), 0), columns - start)
        chosen = np.arange(length)
        if length > k:
            order = np.argsort(~keys(scores[i, start : start + length]), kind="stable")
            chosen = np.sort(order[:k])
        out[i, : len(chosen)] = chosen
    return out


@functools.partial(jax.jit, static_argnames=("k", "implementation"))
def select(scores, lengths, starts, *, k: int, implementation: str = "mosaic_gpu"):
    return jmla.select_topk(scores, lengths, k, row_starts=starts, implementation=implementation)


def check(scores: np.ndarray, lengths: Any, k: int, starts: Any = None) -> None:
    lengths = np.asarray(lengths, np.int32)
    starts = None if starts is None else np.asarray(starts, np.int32)
    got = select(scores, lengths, starts, k=k)
    np.testing.assert_array_equal(got, expected(scores, lengths, k, starts))


# Every way to divide the work: registers, few and many rows, with and without a sample; clusters
# of 8, 4, 2 and 1, two rows in a block; rows that begin anywhere.
@pytest.mark.parametrize(
    ("rows", "columns", "k", "has_starts"),
    [
        (12, 100, 7, False),
        (600, 4096, 512, True),
        (600, 8192, 2048, False),
        (600, 8192, 512, False),
        (12, 8192, 4096, True),
        (12, 16384, 4096, False),
        (12, 32768, 2048, True),
        (36, 32768, 2176, False),
        (12, 16383, 1024, True),
        (12, 50001, 2048, True),
        (12, 131072, 2048, False),
        (24, 65536, 512, True),
        (48, 131072, 2048, False),
        (132, 65536, 4096, False),
        (266, 65536, 2048, True),
        (266, 40004, 1, False),
        (12, 1 << 20, 2048, False),
        (12, (1 << 20) - 3, 4096, True),
    ],
)
def test_kinds_of_rows_and_lengths(rows: int, columns: int, k: int, has_starts: bool):
    distinct = np.concatenate([rows_of_kind(kind, 1, columns) for kind in KINDS])
    scores = distinct[np.arange(rows) % len(KINDS)]
    # The second time that a kind comes, windows are shorter.
    shorter = [columns - 1, k + 1, k, 0, columns // 2, 1, k + 99, -3, columns + 5]
    lengths = [columns if i < len(KINDS) else shorter[i % len(shorter)] for i in range(rows)]
    starts = [i % 7 * (columns // 29) - 1 for i in range(rows)] if has_starts else None
    check(scores, lengths, k, starts)


def test_more_rows_than_an_axis_of_a_grid_has():
    scores = np.random.default_rng(0).standard_normal((70_001, 64)).astype(np.float32)
    got = select(scores, np.full(70_001, 64, np.int32), None, k=5)
    wanted = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :5], axis=1)
    np.testing.assert_array_equal(got, wanted)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_any_bits(data: st.DataObject):
    """Scores of any bits, few distinct ones among them; shapes that are compiled once."""
    columns, k = data.draw(st.sampled_from([(4096, 300), (20000, 2048), (40000, 512)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = 8
    bits = rng.integers(0, 2**32, (rows, columns), np.uint32)
    distinct = data.draw(st.sampled_from([None, 1, 2, 5, 300]))
    if distinct is not None:
        bits = rng.choice(bits[0, :distinct], (rows, columns))
    span = data.draw(st.sampled_from([32, 24, 12, 3]))
    bits = (bits[0, 0] & ~np.uint32(2**span - 1)) | (bits & np.uint32(2**span - 1))
    lengths = rng.integers(0, columns + 1, rows)
    starts = rng.integers(-1, columns // 3, rows)
    check(bits.view(np.float32), lengths, k, starts)


def test_equal_to_the_jnp_path_and_the_same_each_time():
    scores = np.concatenate([rows_of_kind(kind, 1, 32768) for kind in KINDS])
    lengths = np.full(len(KINDS), 32768, np.int32)
    wanted = np.asarray(select(scores, lengths, None, k=2048, implementation="xla"))
    for _ in range(10):
        np.testing.assert_array_equal(select(scores, lengths, None, k=2048), wanted)


@pytest.mark.parametrize(("columns", "page_size"), [(8192, 64), (131072, 1), (40000, 53)])
def test_slots_and_ragged_rows(columns: int, page_size: int):
    rows, requests, k = 20, 6, 2048
    rng = np.random.default_rng(columns)
    scores = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
    lengths = jnp.asarray(rng.integers(0, columns + 1, rows), jnp.int32)
    pages = columns // page_size - 3
    table = rng.permutation(requests * pages).reshape(requests, pages).astype(np.int32)
    table[:, ::7], table[:, 3::11], table[:, 5::13] = -1, 2**31 - 1, -(2**31)
    request = jnp.asarray(rng.integers(-1, requests + 1, rows), jnp.int32)
    select_paged = functools.partial(
        jmla.select_paged_indices,
        scores,
        lengths,
        k,
        jnp.asarray(table),
        page_size=page_size,
        requests=request,
    )
    same(select_paged(implementation="mosaic_gpu"), select_paged(implementation="xla"))
    own = functools.partial(
        jmla.select_paged_indices,
        scores[:requests],
        lengths[:requests],
        k,
        jnp.asarray(table),
        page_size=page_size,
    )
    same(own(implementation="mosaic_gpu"), own(implementation="xla"))
    ragged = functools.partial(jmla.select_ragged_indices, scores, lengths, k, lengths * 3)
    same(ragged(implementation="mosaic_gpu"), ragged(implementation="xla"))


def test_none_takes_the_kernel():
    scores = jnp.zeros((2, 5000), jnp.float32)
    lowered = jax.jit(lambda x: jmla.select_topk(x, jnp.full(2, 5000, jnp.int32), 9)).lower(scores)
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("columns", "tuning"),
    [
        (8192, Resident(256, 8, 0)),
        (8192, Resident(1024, 2, 0)),
        (32768, Resident(1024, 8, 2048)),
        (32768, Filtered(1024, 1, 4, 8192, 1)),
        (131072, Filtered(512, 1, 2, 6144, 2)),
        (131072, Filtered(512, 4, 2, 8192, 2)),
    ],
)
def test_other_tunings(columns: int, tuning: Any):
    """Small capacities and odd clusters: what overflows is found in the row."""
    from pallas_kernels.select_topk import select_topk

    scores = np.concatenate([rows_of_kind(kind, 1, columns) for kind in KINDS])
    lengths = np.full(len(KINDS), columns, np.int32)
    call = jax.jit(functools.partial(select_topk, k=2048, tuning=tuning))
    np.testing.assert_array_equal(call(scores, lengths), expected(scores, lengths, 2048, None))


def same(a: jax.Array, b: jax.Array) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
