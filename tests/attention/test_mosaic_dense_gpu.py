"""The Hopper kernel of dense decode on a Hopper, against f64 over exactly dequantised rows."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.attention import dense_decode
from jmla.layouts import Rows
from tests.attention.cases import INT_MAX, INT_MIN, SCALE, random_queries, same_bits
from tests.attention.exact import (
    BF16,
    FP4,
    FP8,
    FP32,
    PACKED_FP32,
    PACKED_POW2,
    PAGED_V4,
    POW2,
    SCALED_FP8,
    V4,
    Format,
    Paging,
    assert_exact,
    exact_dense,
    poison_all,
    random_paging,
    rows_of,
)
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("hopper")

FORMS = {
    "bf16": BF16,
    "fp8": FP8,
    "scaled fp8": SCALED_FP8,
    "pow2": POW2,
    "fp32": FP32,
    "packed pow2": PACKED_POW2,
    "packed fp32": PACKED_FP32,
    "fp4": FP4,
    "v4": V4,
    "paged v4": PAGED_V4,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
LENGTHS = [0, 1, 2, 63, 64, 65, 300, 1000]


def decode(q: jax.Array, rows: Rows, table: Any, seq_lens: Any, **options: Any):
    return dense_decode(
        q,
        rows,
        jnp.asarray(table, jnp.int32),
        jnp.asarray(np.asarray(seq_lens, np.int32)),
        sm_scale=SCALE,
        implementation="mosaic_gpu",
        **options,
    )


def cache_of(form: Format, paging: Paging, page_size: int) -> Rows:
    """Random rows, NaN where no request has a position."""
    return poison_all(rows_of(form, 1, paging.pages, page_size), paging.slots)


def check(
    form: Format, seq_lens: list[int], *, page_size: int, s_q: int, heads: int, **options: Any
) -> None:
    paging = random_paging(page_size, page_size, seq_lens)
    rows = cache_of(form, paging, page_size)
    q = random_queries(0, len(seq_lens), s_q, heads, width=rows.width)
    ours = decode(q, rows, paging.table, seq_lens, **options)
    exact = exact_dense(
        q,
        rows,
        paging.slots,
        seq_lens,
        sm_scale=SCALE,
        causal=options.get("causal", True),
        window=options.get("window"),
    )
    # One key's logit shows the rounding of fp32 scales; that of bf16 weights adds to the output's.
    lse_abs = 2e-3 if form in (FP32, PACKED_FP32) else 1e-5
    assert_exact(ours, exact, lse_abs=lse_abs, out_error=2.6e-3 if form is BF16 else 2.3e-3)


# Page sizes that the copy engine brings, and others; heads on both sides of the tiles.
HEADS = (1, 7, 8, 16, 20, 40, 64, 70, 128)
PAGES = (1, 16, 37, 64, 128, 32)
TOKENS = (1, 2, 3, 4)
SPLITS = (None, 1, 2, 5)
CASES = [
    (form, HEADS[i % 9], PAGES[i % 6], TOKENS[(i // 2) % 4], SPLITS[(i // 3) % 4])
    for i, form in enumerate([*FORMS.values()] * 3)
]


@pytest.mark.parametrize(("form", "heads", "page_size", "s_q", "splits"), CASES)
def test_against_f64(form: Format, heads: int, page_size: int, s_q: int, splits: int | None):
    check(form, LENGTHS, page_size=page_size, s_q=s_q, heads=heads, num_splits=splits)


@pytest.mark.parametrize("form", [BF16, FP4, POW2])
@pytest.mark.parametrize(("heads", "s_q"), [(16, 2), (128, 1)])
def test_long_contexts(form: Format, heads: int, s_q: int):
    check(form, [40000, 0, 70001], page_size=64, s_q=s_q, heads=heads)


@pytest.mark.parametrize("form", [BF16, FP8])
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_tokens_that_see_each_other(form: Format, heads: int, splits: int):
    check(form, LENGTHS, page_size=64, s_q=3, heads=heads, causal=False, num_splits=splits)


@pytest.mark.parametrize("form", [BF16, FP8, FP4])
@pytest.mark.parametrize(("heads", "s_q"), [(16, 1), (20, 3), (128, 2)])
@pytest.mark.parametrize(("window", "splits"), [(100, 1), (64, 3)])
def test_a_window(form: Format, heads: int, s_q: int, window: int, splits: int):
    check(form, LENGTHS, page_size=64, s_q=s_q, heads=heads, window=window, num_splits=splits)


@every_form
def test_a_request_alone_has_the_bits_it_has_in_a_batch(form: Format):
    lengths = [int(x) for x in np.random.default_rng(0).integers(0, 700, 150)]
    paging = random_paging(3, 64, lengths)
    rows = cache_of(form, paging, 64)
    for heads, s_q in ((20, 1), (26, 2)):
        q = random_queries(0, 150, s_q, heads, width=rows.width)
        together = decode(q, rows, paging.table, lengths, num_splits=3)
        for i in (0, 77, 149):
            alone = decode(
                q[i : i + 1], rows, paging.table[i : i + 1, :11], lengths[i : i + 1], num_splits=3
            )
            same_bits(alone, jax.tree.map(lambda x, i=i: x[i : i + 1], together))


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_to_attend_and_lengths_beyond_the_table(heads: int, splits: int):
    rows, q = rows_of(BF16, 1, 5, 64), random_queries(0, 4, 2, heads, width=576)
    table = np.array([[3, 1], [0, 2], [4, 3], [INT_MAX, INT_MIN]], np.int32)
    lengths = [INT_MIN, -3, INT_MAX, 100]
    out, lse = decode(q, rows, table, lengths, num_splits=splits)
    for i in (0, 1, 3):
        same_bits(out[i], jnp.zeros_like(out[i]))
        assert np.isneginf(np.asarray(lse[i])).all()
    # Both tokens see all of the table: they are far beyond it.
    slots = np.concatenate([np.arange(256, 320), np.arange(192, 256)])[None]
    exact = exact_dense(q[2:3], rows, slots, [10**6], sm_scale=SCALE, causal=True)
    assert_exact((out[2:3], lse[2:3]), exact, out_error=2.6e-3)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(data=st.data())
def test_any_shape(data: st.DataObject):
    form = data.draw(st.sampled_from(list(FORMS.values())))
    lengths = data.draw(st.lists(st.integers(-1, 900), min_size=1, max_size=5))
    page_size = data.draw(st.integers(1, 130))
    if form is PAGED_V4:
        page_size += page_size % 2  # a page's bytes are a multiple of 16
    check(
        form,
        lengths,
        page_size=page_size,
        s_q=data.draw(st.integers(1, 4)),
        heads=data.draw(st.integers(1, 130)),
        causal=data.draw(st.booleans()),
        window=data.draw(st.sampled_from((None, 1, 70, 300))),
        num_splits=data.draw(st.sampled_from((None, 1, 2, 4))),
    )


def test_vmap_and_derivatives():
    paging = random_paging(1, 64, [100, 200])
    rows = rows_of(BF16, 1, paging.pages, 64)
    q = random_queries(0, 3, 2, 2, 16, width=576)
    one = functools.partial(decode, num_splits=1)
    table, lengths = jnp.asarray(paging.table), jnp.array([100, 200], jnp.int32)
    together = jax.vmap(lambda q: one(q, rows, table, lengths))(q)
    for i in range(3):
        same_bits(jax.tree.map(lambda x, i=i: x[i], together), one(q[i], rows, table, lengths))

    def loss(q: jax.Array, implementation: Any) -> jax.Array:
        out, lse = dense_decode(
            q, rows, table, lengths, sm_scale=SCALE, implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

    ours, xla = (jax.grad(loss)(q[0], each) for each in ("mosaic_gpu", "xla"))
    assert_close(ours, xla, abs_tol=2e-2, rel_tol=2e-2)


def test_none_is_the_kernel_here():
    paging = random_paging(1, 64, [100, 200])
    rows, q = rows_of(BF16, 1, paging.pages, 64), random_queries(0, 2, 1, 16, width=576)
    table, lengths = jnp.asarray(paging.table), jnp.array([100, 200], jnp.int32)
    same_bits(
        dense_decode(q, rows, table, lengths, sm_scale=SCALE), decode(q, rows, table, lengths)
    )
