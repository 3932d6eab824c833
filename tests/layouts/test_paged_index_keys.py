"""Index keys that stay the pages of another engine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import Cache, KVLayout, append, init_cache, paged_indexer_logits
from jmla.indexer import indexer_logits
from jmla.layouts import (
    IndexKeyRows,
    PagedIndexKeyRows,
    ScaleFormat,
    paged_index_keys,
    quantize_index_keys,
)
from tests.layouts.cases import RANK, ROPE_DIM, assert_same_rows, latents

DIM, SIZE, SPARE = 32, 4, 12
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def both(pages: int, scale_format: ScaleFormat = "fp32") -> tuple[PagedIndexKeyRows, IndexKeyRows]:
    keys = latents(pages, SIZE, width=DIM, seed=pages)
    rows = quantize_index_keys(keys, scale_format=scale_format)
    packed = rows.pack(page_bytes=SIZE * (DIM + 4) + SPARE)
    return paged_index_keys(packed, page_size=SIZE, dim=DIM, scale_format=scale_format), rows


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_rows_are_those_of_unpacked_keys(scale_format: ScaleFormat):
    paged, rows = both(3, scale_format)
    assert (paged.shape, paged.num_slots, paged.dim, paged.bytes_per_token) == ((3, 4), 12, 32, 36)
    assert_same_rows(paged.unpacked(), rows)
    slots = jnp.array([[0, 11, -1], [12, INT_MIN, 7]], jnp.int32)
    assert_same_rows(paged.gather(slots).unpacked(), rows.gather(slots))
    np.testing.assert_array_equal(paged.dequantize(), rows.dequantize())


def test_append_writes_the_pages_and_nothing_else():
    paged, rows = both(5)
    cache = init_cache(
        KVLayout.BF16, num_pages=5, page_size=SIZE, rank=RANK, rope_dim=ROPE_DIM, index_dim=DIM
    )
    slots = jnp.array([19, -1, 0, 20, INT_MAX, 6], jnp.int32)
    new = latents(6), latents(6, width=DIM, seed=9)
    after = jax.jit(append)(Cache(cache.rows, paged), slots, *new).index_keys
    wanted = jax.jit(append)(Cache(cache.rows, rows), slots, *new).index_keys
    assert isinstance(after, PagedIndexKeyRows)
    assert_same_rows(after.unpacked(), wanted)
    np.testing.assert_array_equal(after.packed[:, -SPARE:], paged.packed[:, -SPARE:])


def test_the_indexer_reads_them_where_they_are():
    paged, rows = both(6)
    q = latents(2, 1, 3, width=DIM, seed=4)
    weights = jnp.ones((2, 1, 3), jnp.float32)
    table, lengths = jnp.array([[3, 0], [5, -1]], jnp.int32), jnp.array([[7], [3]], jnp.int32)
    ours, theirs = (paged_indexer_logits(q, weights, k, table, lengths) for k in (paged, rows))
    np.testing.assert_array_equal(ours, theirs)
    chosen = jnp.array([4, 9, -1, 23], jnp.int32)
    window = jnp.zeros(2, jnp.int32), jnp.full(2, 4, jnp.int32)
    ours, theirs = (
        indexer_logits(q[:, 0], weights[:, 0], k.gather(chosen), *window) for k in (paged, rows)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_wrong_pages_are_refused():
    packed = both(2)[0].packed
    wrong: list[dict[str, Any]] = [{"page_size": 5}, {"page_size": 0}, {"page_size": 4, "dim": 64}]
    for options in wrong:
        with pytest.raises(ValueError, match="expected"):
            paged_index_keys(packed, **({"dim": DIM} | options))
    with pytest.raises(ValueError, match="expected uint8"):
        paged_index_keys(packed.astype(jnp.int8), page_size=SIZE, dim=DIM)
