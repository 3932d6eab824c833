"""Grouped-query decode against f64, without a GPU: what warps copy, read, mask and join."""

from typing import Any

import numpy as np
import pytest

from jmla import _mosaic_gqa
from tests.attention.gqa_cases import Sizes, check
from tests.emulator.kernels import kernels

FORMATS = ["bf16", "scaled fp8", "fp4"]


def decode(
    q: Any, rows: Any, table: Any, lengths: Any, *, sm_scale: float, causal: bool, num_splits: int
) -> tuple[Any, Any]:
    call = kernels().modules["gqa_decode.call"]
    pages = call.HeadPages(
        format=dict(_mosaic_gqa.FORMATS)[rows.kv_cache_dtype],
        arrays={name: np.asarray(x) for name, x in _mosaic_gqa.arrays_of(rows).items()},
        table=np.asarray(table),
        lengths=np.asarray(lengths),
    )
    return call.gqa_decode(
        np.asarray(q), pages, sm_scale=sm_scale, causal=causal, num_splits=num_splits
    )


@pytest.mark.parametrize("name", FORMATS)
def test_more_steps_than_stages(name: str):
    check(decode, name, [0, 700, 33], Sizes(1, 16, 128, 1, 16), num_splits=1)


@pytest.mark.parametrize("name", FORMATS)
def test_two_tiles_of_tokens_that_differ_and_parts(name: str):
    """Of pages of a size that divides nothing; some rows of the second tile do not exist."""
    check(decode, name, [1, 150, 2], Sizes(2, 7, 128, 3, 37), num_splits=2)


@pytest.mark.parametrize("name", FORMATS)
def test_heads_of_64_in_more_tiles_than_a_block_has(name: str):
    check(decode, name, [70], Sizes(1, 20, 64, 2, 64), num_splits=3, causal=False)
