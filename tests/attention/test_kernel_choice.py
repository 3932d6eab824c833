"""Which kind of block, how many heads and how many parts a launch of sparse decode takes."""

import pytest

from pallas_kernels.sparse_decode import FORMATS
from pallas_kernels.sparse_decode.tuning import Choice, choose, has_wide_blocks

WIDE = {name for name, row_format in FORMATS.items() if has_wide_blocks(row_format)}


def test_wide_blocks_read_rows_of_512_columns_with_wide_scales():
    assert set(FORMATS) - {"fp4", "v4", "paged_v4"} == WIDE


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("splits", [1, 3])
def test_with_splits_given_the_batch_decides_nothing_that_shows_in_bits(name: str, splits: int):
    for heads in (1, 16, 32, 33, 64, 128, 130):
        choices = [choose(FORMATS[name], n, heads, 2048, splits) for n in (1, 2, 16, 128, 70_000)]
        assert {choice.splits for choice in choices} == {splits}
        assert {choice.wide for choice in choices} == {name in WIDE and heads > 32}


def test_a_full_batch_is_not_split():
    form = FORMATS["block_scale_pow2"]
    assert choose(form, 128, 128, 2048, None) == Choice(wide=True, heads=64, splits=1)
    assert choose(form, 128, 64, 2048, None) == Choice(wide=True, heads=64, splits=1)
    assert choose(form, 128, 16, 2048, None) == Choice(wide=False, heads=16, splits=1)
    assert choose(FORMATS["fp4"], 128, 128, 2048, None) == Choice(wide=False, heads=64, splits=1)


def test_a_small_batch_fills_the_gpu_with_parts():
    form = FORMATS["block_scale_pow2"]
    alone, few = choose(form, 1, 128, 2048, None), choose(form, 16, 128, 2048, None)
    assert not alone.wide and alone.splits > 4
    assert few.wide and few.splits == 4


def test_there_are_no_more_parts_than_blocks_of_keys():
    form = FORMATS["bf16"]
    assert choose(form, 1, 128, 64, None).splits == 1
    assert choose(form, 1, 128, 130, 32).splits == 3
    assert choose(form, 1, 128, 1, 5).splits == 1
