"""The indexer's choice on a Hopper: bit for bit a selection from the logits of the kernel."""

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
from jmla._mosaic_logits import NONE_FORCED, Forced, Queries
from pallas_kernels import indexer_topk
from tests.selection.index_cases import paged

pytestmark = pytest.mark.usefixtures("hopper")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def joined(queries: Queries, keys: Any, k: int, slots: bool, forced: Forced) -> jax.Array:
    """The two launches, whether they pay or not."""
    shape, operands = _mosaic_logits.arguments(queries, keys, forced)
    assert queries.page_table is not None
    conversion: Any = None
    if slots:
        from pallas_kernels.select_topk import PagedSlots

        requests, max_pages = queries.page_table.shape
        conversion = PagedSlots(shape.keys.page_size, requests, max_pages, own_request=True)
    return indexer_topk.indexer_topk(shape, operands, k, conversion=conversion)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def apart(queries: Queries, keys: Any, k: int, slots: bool, forced: Forced) -> jax.Array:
    """Logits in memory and a sort."""
    logits = _mosaic_logits.logits(queries, keys, forced)[:, 0]
    lengths = queries.ends[:, 0]
    if not slots:
        return jmla.select_topk(logits, lengths, k, implementation="xla")
    assert queries.page_table is not None
    return jmla.select_paged_indices(
        logits,
        lengths,
        k,
        queries.page_table,
        page_size=keys.shape[1],
        implementation="xla",
    )


def check(
    queries: Queries, keys: Any, k: int, *, slots: bool = False, forced: Forced = NONE_FORCED
) -> None:
    got = joined(queries, keys, k, slots, forced)
    np.testing.assert_array_equal(got, apart(queries, keys, k, slots, forced))


def lengths_of_all_sorts(rows: int, columns: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    ends = rng.integers(0, columns + 1, (rows, 1))
    some = [columns, k, k + 1, 0, -7, columns + 9, 1, k - 1]
    ends[: len(some), 0] = some[:rows]
    return ends


@pytest.mark.parametrize(
    ("rows", "pages", "k", "options"),
    [
        (12, 100, 2048, {}),
        (64, 600, 2048, {"form": "packed"}),
        (300, 80, 512, {"heads": 16}),
        (3, 2000, 1024, {"heads": 8, "missing": 5}),
        (1, 3000, 2176, {"heads": 4}),
        (40, 700, 4096, {"heads": 24, "dim": 64}),
        (20, 900, 1, {"page_size": 53, "heads": 3}),
        (200, 300, 2048, {"heads": 8}),
    ],
)
def test_lengths_and_sizes(rows: int, pages: int, k: int, options: Any):
    columns = pages * options.get("page_size", 64)
    case = paged(lengths_of_all_sorts(rows, columns, k), max_pages=pages, **options)
    check(case.queries, case.keys, k, slots=True)
    check(case.queries, case.keys, k, forced=Forced(5, 70))


@pytest.mark.parametrize("kind", ["equal", "few", "ascending", "descending", "nan"])
def test_kinds_of_logits(kind: str):
    """By keys of one value: a logit is the key's scale, or that of its bits."""
    rows, pages, k = 9, 400, 2048
    case = paged(np.full((rows, 1), pages * 64 - 3), max_pages=pages, heads=8)
    assert isinstance(case.keys, jmla.IndexKeyRows)
    scales = np.asarray(case.keys.scales).copy()
    place = np.zeros(scales.shape, np.int64)
    for row in np.asarray(case.queries.page_table):
        for number, page in enumerate(row):
            place[page] = number * 64 + np.arange(64)
    match kind:
        case "equal":
            scales[:] = 1
        case "few":
            scales = np.round(scales * 200) / 200
        case "ascending":
            scales = (place + 1).astype(np.float32)
        case "descending":
            scales = (1e6 - place).astype(np.float32)
        case "nan":
            scales[place % 3 == 1] = np.nan
    keys = type(case.keys)(jnp.ones_like(case.keys.keys), jnp.asarray(scales, jnp.float32))
    queries = case.queries._replace(
        q=jnp.ones_like(case.queries.q), weights=jnp.ones_like(case.queries.weights)
    )
    check(queries, keys, k)
    check(queries._replace(weights=-queries.weights), keys, k)


@pytest.mark.parametrize("long", [0, 13, 63])
def test_one_long_request_among_short_ones(long: int):
    """All blocks have a list of it."""
    ends = np.full((64, 1), 3000)
    ends[long] = 64 * 2000
    case = paged(ends, max_pages=2000, heads=4)
    check(case.queries, case.keys, 2048, slots=True)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25)
def test_any_lengths(data: st.DataObject):
    """A shape that is compiled once; few values of many keys."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([700, 5000, 30000]))
    case = paged(rng.integers(-3, spread, (17, 1)), max_pages=460, heads=8)
    digits = data.draw(st.sampled_from([None, 1, 2]))
    keys: Any = case.keys
    if digits is not None:
        rounded = np.round(np.asarray(keys.keys.astype(jnp.float32)) / 200, 0) * 200
        keys = type(keys)(jnp.asarray(rounded, keys.keys.dtype), jnp.round(keys.scales, digits))
    check(case.queries, keys, 700)


@pytest.mark.parametrize(
    ("rows", "pages", "queries", "times"), [(10, 700, 1, 22), (3, 40, 1, 1), (3, 60, 2, 1)]
)
def test_the_op_takes_the_kernels_where_they_pay_and_where_they_do_not(
    rows: int, pages: int, queries: int, times: int
):
    case = paged(np.full((rows, queries), pages * 64), max_pages=pages, heads=8)
    repeated = [None if x is None else jnp.concatenate([x] * times) for x in case.queries]
    given = Queries(*repeated)  # type: ignore[arg-type]
    assert given.page_table is not None
    shape, _ = _mosaic_logits.arguments(given, case.keys)
    assert indexer_topk.pays(shape) == (times > 1)
    op = functools.partial(
        jmla.paged_indexer_topk, given.q, given.weights, case.keys, given.page_table, given.ends
    )
    logits = _mosaic_logits.logits(given, case.keys).reshape(rows * queries * times, -1)
    wanted = jmla.select_topk(logits, given.ends.reshape(-1), 512, implementation="xla")
    np.testing.assert_array_equal(op(512).reshape(wanted.shape), wanted)
    requests = jnp.repeat(jnp.arange(rows * times, dtype=jnp.int32), queries)
    slots = jmla.paged_indices(wanted, given.page_table, page_size=64, requests=requests)
    np.testing.assert_array_equal(op(512, slots=True).reshape(slots.shape), slots)
    apart = op(512, joined=False)
    np.testing.assert_array_equal(apart.reshape(wanted.shape), wanted)
