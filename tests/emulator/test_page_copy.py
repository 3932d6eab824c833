"""The kernel that copies pages, thread by thread, against numpy."""

from typing import Any

import numpy as np
import pytest

from tests.emulator.kernels import kernels

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
# Pages of several pieces, of one, of a part of one, of words of four bytes, of single bytes.
SHAPES = [(9, 1000), (1, 4096), (3, 16), (7, 12), (5, 11)]


def pages(n: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (n, *shape), np.uint8) for shape in SHAPES]


def copy_pages(*arguments: Any) -> list[np.ndarray]:
    return kernels().modules["page_copy.call"].copy_pages(*arguments)


def test_pages_between_arrays():
    sources, targets = pages(4, 0), pages(6, 1)
    pairs = [(0, 5), (3, 0), (-1, 1), (4, 2), (1, 6), (2, -1), (INT_MIN, 3), (2, INT_MAX), (2, 3)]
    froms, tos = np.array(pairs, np.int32).T.copy()
    moved = copy_pages(sources, targets, froms, tos)
    for source, target, after in zip(sources, targets, moved, strict=True):
        target[[5, 0, 3]] = source[[0, 3, 2]]
        np.testing.assert_array_equal(after, target)


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_pages_to_a_buffer_and_from_it(shape: tuple[int, ...]):
    (source,) = [np.random.default_rng(2).integers(0, 99, (5, *shape), np.int32)]
    (taken,) = copy_pages([source], None, np.array([4, 0, 4, 7], np.int32), None)
    np.testing.assert_array_equal(taken[:3], source[[4, 0, 4]])
    (after,) = copy_pages([taken], [source], None, np.array([1, 3, 2, -1], np.int32))
    np.testing.assert_array_equal(after, source[[0, 4, 4, 0, 4]])
