"""The kernel of index logits on a Hopper against f64 on the dequantised keys."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla import _mosaic_logits
from tests.selection.index_cases import Case, paged, ragged

pytestmark = pytest.mark.usefixtures("hopper")

# The tensor cores add a head's products with some 13 bits below the largest; logits are about 1.
TOLERANCE = 2e-3


def check(case: Case) -> np.ndarray:
    assert not _mosaic_logits.unsupported_reasons(case.queries.q, case.keys)
    got = np.asarray(_mosaic_logits.logits(case.queries, case.keys))
    np.testing.assert_allclose(got, case.expected(), rtol=TOLERANCE, atol=TOLERANCE)
    return got


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 13, 16, 32, 33, 48, 63, 64])
@pytest.mark.parametrize("form", ["leaves", "packed", "bf16"])
def test_heads(heads: int, form: Any):
    ends = [[1000], [0], [64], [-7], [1 << 30], [3]]
    check(paged(ends, max_pages=33, heads=heads, form=form, missing=2, seed=heads))


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("heads", [4, 64])
def test_queries_of_a_request(queries: int, heads: int):
    rng = np.random.default_rng(queries)
    ends = rng.integers(-3, 64 * 40 + 9, (7, queries))
    check(paged(ends, max_pages=40, heads=heads, seed=queries))


@pytest.mark.parametrize("page_size", [1, 2, 7, 53, 64, 128, 256, 1000])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("form", ["leaves", "bf16"])
def test_pages_of_any_size(page_size: int, dim: int, form: Any):
    rng = np.random.default_rng(page_size)
    pages = -(-3000 // page_size)
    ends = rng.integers(0, pages * page_size + 2, (5, 1))
    where: Any = {"page_size": page_size, "dim": dim, "form": form}
    check(paged(ends, max_pages=pages, missing=3, heads=40, **where))


@pytest.mark.parametrize(
    ("page_size", "extra_bytes"), [(64, 0), (64, 48), (16, 0), (5, 12), (12, 0)]
)
def test_pages_of_another_engine(page_size: int, extra_bytes: int):
    ends = [[700, 701], [0, 9], [5000, 4999]]
    pages = -(-2000 // page_size)
    check(paged(ends, max_pages=pages, page_size=page_size, form="packed", extra_bytes=extra_bytes))


@pytest.mark.parametrize(("requests", "pages"), [(1, 1), (1, 600), (40, 65), (300, 3)])
def test_numbers_of_requests(requests: int, pages: int):
    rng = np.random.default_rng(requests)
    ends = rng.integers(-10, pages * 64 + 10, (requests, 1))
    ends[rng.random(requests) < 0.3] = 0
    check(paged(ends, max_pages=pages, heads=16, seed=requests))


@pytest.mark.parametrize("heads", [1, 4, 24, 64])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (3, 130), (257, 3003), (900, 640)])
def test_windows_of_one_buffer(heads: int, tokens: int, keys: int):
    rng = np.random.default_rng(heads * tokens)
    starts = rng.integers(-20, keys + 5, tokens)
    ends = starts + rng.integers(-10, keys, tokens)
    ends[::7], starts[::5] = 2**31 - 1, -(2**31)
    check(ragged(starts, ends, keys, heads=heads, seed=tokens))


def test_windows_of_a_prompt():
    tokens = np.arange(1000)
    check(ragged(np.zeros_like(tokens), tokens + 1, 1000, heads=32))


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25)
def test_any_lengths_and_windows(data: st.DataObject):
    """Shapes that are compiled once."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    spread = data.draw(st.sampled_from([2, 70, 700, 1500]))
    if data.draw(st.booleans()):
        ends = rng.integers(-3, spread, (9, 3))
        check(
            paged(
                ends,
                max_pages=20,
                heads=24,
                missing=data.draw(st.sampled_from([0, 1, 5])),
                seed=seed,
            )
        )
    else:
        starts = rng.integers(-9, 1300, 70)
        check(ragged(starts, starts + rng.integers(-5, spread, 70), 1283, heads=9, seed=seed))


def test_nan_keys_that_are_seen_and_the_same_each_time():
    case = paged([[500], [640]], max_pages=10)
    keys = case.keys
    assert isinstance(keys, jmla.layouts.IndexKeyRows)
    assert case.queries.page_table is not None
    page, place = int(case.queries.page_table[1, 2]), 17
    nan = jnp.array(jnp.nan, keys.keys.dtype)
    broken = type(keys)(keys.keys.at[page, place, 5].set(nan), keys.scales)
    first = np.asarray(_mosaic_logits.logits(case.queries, broken))
    wanted = case.expected()
    wanted[1, 0, 2 * 64 + place] = np.nan
    np.testing.assert_allclose(first, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    for _ in range(10):
        np.testing.assert_array_equal(_mosaic_logits.logits(case.queries, broken), first)


@functools.partial(jax.jit, static_argnames="implementation")
def both(case_queries: Any, keys: Any, *, implementation: str):
    return jmla.paged_indexer_logits(
        case_queries.q,
        case_queries.weights,
        keys,
        case_queries.page_table,
        case_queries.ends,
        implementation=implementation,
    )


def test_the_default_is_the_kernel_and_agrees_with_xla():
    case = paged([[4000], [4096], [33]], max_pages=64)
    ours = both(case.queries, case.keys, implementation="mosaic_gpu")
    assert "mosaic_gpu" in str(
        jax.jit(jmla.paged_indexer_logits)
        .lower(
            case.queries.q,
            case.queries.weights,
            case.keys,
            case.queries.page_table,
            case.queries.ends,
        )
        .as_text()
    )
    wanted = both(case.queries, case.keys, implementation="xla")
    np.testing.assert_allclose(ours, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_under_vmap():
    case = paged([[400], [500]], max_pages=8)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case.queries)
    got = jax.vmap(_mosaic_logits.logits, in_axes=(0, None))(stacked, case.keys)
    wanted = case.expected()
    np.testing.assert_allclose(got[0], wanted, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(got[1], wanted[::-1], rtol=TOLERANCE, atol=TOLERANCE)
