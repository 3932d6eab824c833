"""Whose blocks a launch of sparse prefill takes."""

import pytest

from pallas_kernels.sparse_decode import FORMATS
from pallas_kernels.sparse_prefill.tuning import is_for_own_blocks


@pytest.mark.parametrize("name", FORMATS)
def test_own_blocks_read_bf16_rows_alone(name: str):
    assert is_for_own_blocks(name, 4096, 128) == (name == "bf16")


@pytest.mark.parametrize(
    ("n", "heads", "own"),
    [(1, 128, False), (33, 128, False), (34, 128, True), (66, 64, False), (67, 1, True)],
)
def test_few_tasks_go_to_the_decode_kernel_which_splits_them(n: int, heads: int, own: bool):
    assert is_for_own_blocks("bf16", n, heads) == own
