"""The indexer's choice through XLA is the two steps it stands for; what the kernels refuse."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from tests.selection.index_cases import paged


def arguments(queries: int = 2) -> Any:
    ends = np.array([[150, 151], [0, 33]])[:, :queries]
    case = paged(ends, max_pages=3, heads=2, missing=1)
    given = case.queries
    assert given.page_table is not None
    return given.q, given.weights, case.keys, given.page_table, given.ends


@pytest.mark.parametrize("forced", [{}, {"first": 2, "last": 3}])
def test_positions_and_slots(forced):
    q, weights, keys, table, lengths = arguments()
    logits = jmla.paged_indexer_logits(
        q, weights, keys, table, lengths, **forced, implementation="xla"
    ).reshape(4, -1)
    flat, requests = lengths.reshape(-1), jnp.array([0, 0, 1, 1], jnp.int32)
    got = jmla.paged_indexer_topk(
        q, weights, keys, table, lengths, 20, **forced, implementation="xla"
    )
    wanted = jmla.select_topk(logits, flat, 20, implementation="xla")
    np.testing.assert_array_equal(got.reshape(4, 20), wanted)
    if forced:
        np.testing.assert_array_equal(got[0, 0, [0, 1, -3, -2, -1]], [0, 1, 147, 148, 149])
    slots = jmla.paged_indexer_topk(
        q, weights, keys, table, lengths, 20, slots=True, **forced, implementation="xla"
    )
    of_positions = jmla.paged_indices(wanted, table, page_size=64, requests=requests)
    np.testing.assert_array_equal(slots.reshape(4, 20), of_positions)


def test_what_cannot_be_served():
    q, weights, keys, table, lengths = arguments(1)
    with pytest.raises(NotImplementedError, match=r"q\.dtype.*k=5000"):
        jmla.paged_indexer_topk(
            q.astype(jnp.bfloat16),
            weights,
            keys,
            table,
            lengths,
            5000,
            implementation="mosaic_gpu",
        )
    with pytest.raises(NotImplementedError, match="one query per request: s_q=2"):
        jmla.paged_indexer_topk(
            jnp.repeat(q, 2, axis=1),
            jnp.repeat(weights, 2, axis=1),
            keys,
            table,
            jnp.repeat(lengths, 2, axis=1),
            9,
            joined=True,
            implementation="mosaic_gpu",
        )
    with pytest.raises(ValueError, match="k=0"):
        jmla.paged_indexer_topk(q, weights, keys, table, lengths, 0)
    with pytest.raises(ValueError, match="first=-1"):
        jmla.paged_indexer_topk(q, weights, keys, table, lengths, 3, first=-1)
    with pytest.raises(ValueError, match=r"page_table\.shape"):
        jmla.paged_indexer_topk(q, weights, keys, table[0], lengths, 3)
