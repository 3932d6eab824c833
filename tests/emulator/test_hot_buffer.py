"""The kernels of host-resident caches on the emulator against the jnp path."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.hisparse import HiSparseSizes, Residency, plan_swap
from jmla.hisparse.placement import place_new
from tests.emulator.kernels import kernels
from tests.hisparse.residencies import random_residency, random_selection

call = kernels().modules["hot_buffer.call"]
Shape = kernels().modules["hot_buffer.shape"].Shape

SIZES = HiSparseSizes(
    requests=4,
    max_length=1500,
    page_size=16,
    num_pages=400,
    num_buffer_pages=60,
    device_buffer_size=150,
    newest=3,
)


def shape_of(residency: Residency, positions: int) -> Any:
    sizes = residency.sizes
    return Shape(
        requests=sizes.requests,
        positions=positions,
        size=sizes.device_buffer_size,
        newest=sizes.newest,
        page_size=sizes.page_size,
        max_pages=sizes.max_pages,
        num_pages=sizes.num_pages,
        max_buffer_pages=sizes.max_buffer_pages,
        num_buffer_pages=sizes.num_buffer_pages,
    )


def swap(residency: Residency, positions: np.ndarray, seq_lens: np.ndarray, threads: int) -> Any:
    tables = ("tokens", "lru", "page_table", "buffer_table")
    arrays = {name: np.asarray(getattr(residency, name)) for name in tables}
    shape = shape_of(residency, positions.shape[1])
    return call.plan_swap(shape, **arrays, positions=positions, seq_lens=seq_lens, threads=threads)


@pytest.mark.parametrize(
    ("size", "n", "threads", "seed"),
    [(150, 64, 128, 0), (150, 150, 128, 1), (150, 37, 256, 2), (1100, 530, 128, 3)],
    ids=["some", "all", "few", "more than registers hold"],
)
def test_a_swap_is_what_the_jnp_path_makes_of_it(size: int, n: int, threads: int, seed: int):
    rng = np.random.default_rng(seed)
    sizes = dataclasses.replace(SIZES, device_buffer_size=size, num_buffer_pages=300)
    residency, lengths = random_residency(rng, sizes)
    for _ in range(2):
        positions = random_selection(rng, residency, lengths, n)
        got = swap(residency, positions, lengths, threads)
        after, expected = jax.jit(plan_swap)(
            residency, jnp.asarray(positions), jnp.asarray(lengths)
        )
        np.testing.assert_array_equal(got.tokens, after.tokens)
        np.testing.assert_array_equal(got.lru, after.lru)
        np.testing.assert_array_equal(got.rows, expected.slots)
        np.testing.assert_array_equal(got.sources, expected.sources)
        np.testing.assert_array_equal(got.targets, expected.targets)
        residency = after


@pytest.mark.parametrize(("n", "together"), [(64, 1), (150, 4)])
def test_a_swap_fetches_what_is_missing(n: int, together: int):
    rng = np.random.default_rng(n)
    residency, lengths = random_residency(rng, SIZES)
    widths = {"a": (36, np.int32), "b": (7, np.uint8)}
    stored, buffer = (
        {
            name: rng.integers(0, 255, (pages * SIZES.page_size, width)).astype(dtype)
            for name, (width, dtype) in widths.items()
        }
        for pages in (SIZES.num_pages, SIZES.num_buffer_pages)
    )
    positions = random_selection(rng, residency, lengths, n)
    tables = ("tokens", "lru", "page_table", "buffer_table")
    arrays = {name: np.asarray(getattr(residency, name)) for name in tables}
    tokens, lru, rows, copied = call.swap_rows(
        shape_of(residency, n),
        stored,
        buffer,
        **arrays,
        positions=positions,
        seq_lens=lengths,
        together=together,
    )
    after, expected = jax.jit(plan_swap)(residency, jnp.asarray(positions), jnp.asarray(lengths))
    for got, wanted in [(tokens, after.tokens), (lru, after.lru), (rows, expected.slots)]:
        np.testing.assert_array_equal(got, wanted)
    fetched = np.asarray(expected.sources) >= 0
    assert fetched.sum() > 20
    for name, old in buffer.items():
        wanted = old.copy()
        wanted[np.asarray(expected.targets)[fetched]] = stored[name][
            np.asarray(expected.sources)[fetched]
        ]
        np.testing.assert_array_equal(copied[name], wanted)


@pytest.mark.parametrize("count", [1, 3])
def test_new_tokens_are_placed_as_the_jnp_path_places_them(count: int):
    rng = np.random.default_rng(count)
    sizes = dataclasses.replace(SIZES, requests=8, num_pages=800, num_buffer_pages=90)
    residency, lengths = random_residency(rng, sizes)
    residency = dataclasses.replace(residency, page_table=residency.page_table.at[5, 0].set(-1))
    lengths[:7] = lengths[:7] - np.array([0, 0, 2, 0, 1, 0, 600])
    got = call.place_new(
        shape_of(residency, 1),
        count,
        tokens=np.asarray(residency.tokens),
        page_table=np.asarray(residency.page_table),
        buffer_table=np.asarray(residency.buffer_table),
        seq_lens=lengths,
    )
    after, *rows = place_new(residency, jnp.asarray(lengths), count)
    for ours, theirs in zip(got, (after.tokens, *rows), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("together", [1, 3, None])
def test_rows_are_copied_and_the_others_stay(together: int | None):
    rng = np.random.default_rng(0)
    widths = {"a": (36, np.int32), "b": (7, np.uint8), "c": (12, np.uint16), "d": (4, np.float32)}
    stored, buffer = (
        {
            name: rng.integers(0, 255, (rows, width)).astype(dtype)
            for name, (width, dtype) in widths.items()
        }
        for rows in (50, 90)
    )
    sources = rng.integers(0, 50, 200).astype(np.int32)
    targets = np.full(200, -1, np.int32)
    targets[rng.permutation(200)[:90]] = rng.permutation(90)
    sources[::3], sources[1], targets[2] = -1, 50, 90
    sources[7], sources[8], targets[11] = -(2**31), 2**31 - 1, 2**31 - 1
    got = call.copy_rows(
        stored, buffer, sources, targets, num_sources=50, num_targets=90, together=together
    )
    moved = (sources >= 0) & (sources < 50) & (targets >= 0) & (targets < 90)
    assert moved.sum() > 20
    for name, rows in buffer.items():
        expected = rows.copy()
        expected[targets[moved]] = stored[name][sources[moved]]
        np.testing.assert_array_equal(got[name], expected)
