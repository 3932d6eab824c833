"""The Hopper kernel of grouped-query decode on a Hopper, against f64."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import gqa_decode
from jmla.layouts import FP4KeyValues
from tests.attention.cases import INT_MAX, INT_MIN, same_bits
from tests.attention.gqa_cases import (
    FORMATS,
    LENGTHS,
    Results,
    Sizes,
    case,
    check,
    exact_gqa,
    random_key_values,
    random_queries,
)
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("hopper")

each_format = pytest.mark.parametrize("name", FORMATS)


def decode(q: jax.Array, rows: Any, table: Any, lengths: Any, **options: Any) -> Results:
    return gqa_decode(q, rows, table, lengths, implementation="mosaic_gpu", **options)


GROUPS = (16, 1, 5, 8, 64)
PAGES = (64, 1, 16, 37, 128, 32)
TOKENS = (1, 2, 3)
SPLITS = (None, 1, 2, 5)
CASES = [
    (
        name,
        Sizes((1, 4, 2)[i % 3], GROUPS[i % 5], (128, 64)[i % 2], TOKENS[i % 3], PAGES[i % 6]),
        SPLITS[i % 4],
    )
    for i, name in enumerate([*FORMATS] * 4)
]


@pytest.mark.parametrize(("name", "sizes", "splits"), CASES)
def test_against_f64(name: str, sizes: Sizes, splits: int | None):
    check(decode, name, LENGTHS, sizes, num_splits=splits)


@each_format
def test_long_contexts(name: str):
    check(decode, name, [40000, 0, 70001], Sizes(2, 16, 128, 1, 64))


@each_format
def test_tokens_that_see_each_other(name: str):
    check(decode, name, LENGTHS, Sizes(2, 16, 128, 3, 64), causal=False, num_splits=2)


@each_format
def test_a_request_alone_has_the_bits_it_has_in_a_batch(name: str):
    lengths = [int(x) for x in np.random.default_rng(0).integers(0, 700, 150)]
    for s_q in (1, 2):
        q, rows, paging = case(name, lengths, Sizes(4, 16, 128, s_q, 64))
        table, lens = jnp.asarray(paging.table), jnp.asarray(lengths, jnp.int32)

        def part(of: slice, q: Any = q, rows: Any = rows, table: Any = table, lens: Any = lens):
            return decode(q[of], rows, table[of], lens[of], sm_scale=0.1, num_splits=3)

        together = part(slice(None))
        for i in (0, 77, 149):
            same_bits(part(slice(i, i + 1)), jax.tree.map(lambda x, i=i: x[i : i + 1], together))


@each_format
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_to_attend_and_lengths_beyond_the_table(name: str, splits: int):
    sizes = Sizes(2, 16, 128, 2, 64)
    rows, q = random_key_values(1, name, (5, 64), sizes), random_queries(0, 4, sizes)
    table = np.array([[3, 1], [0, 2], [4, 3], [INT_MAX, INT_MIN]], np.int32)
    lengths = [INT_MIN, -3, INT_MAX, 100]
    out, lse = decode(
        q,
        rows,
        jnp.asarray(table),
        jnp.asarray(np.array(lengths, np.int32)),
        sm_scale=0.1,
        num_splits=splits,
    )
    for i in (0, 1, 3):
        same_bits(out[i], jnp.zeros_like(out[i]))
        assert np.isneginf(np.asarray(lse[i])).all()
    # Both tokens see all of the table: they are far beyond it.
    slots = np.concatenate([np.arange(256, 320), np.arange(192, 256)])[None]
    exact = exact_gqa(q[2:3], rows, slots, [10**6], sm_scale=0.1, causal=True)
    assert_close(lse[2:3], exact[1], abs_tol=1e-5, rel_tol=1e-4)
    assert_close(out[2:3], exact[0], abs_tol=6e-3, rel_tol=2.01 / 128)


def test_scales_of_every_size():
    """Of FP4, from the least that the codec has, to 2^60; logits stay within f32."""
    sizes = Sizes(1, 16, 128, 1, 16)
    rng = np.random.default_rng(0)
    for power in (-33, -10, 0, 20, 60):
        q, rows, paging = case("fp4", [100], sizes)
        assert isinstance(rows, FP4KeyValues)
        scales = rng.integers(power - 3, power + 1, rows.value_scales.shape).clip(-33)
        rows = FP4KeyValues(
            rows.keys,
            rows.values,
            rows.key_scales,
            jnp.asarray(scales + 127, jnp.uint8),
            kv_heads=1,
            head_dim=128,
        )
        out, _ = decode(q, rows, jnp.asarray(paging.table), jnp.array([100]), sm_scale=0.1)
        exact, _ = exact_gqa(q, rows, paging.slots, [100], sm_scale=0.1, causal=True)
        assert_close(
            np.asarray(out, np.float64) / 2.0**power, exact / 2.0**power, abs_tol=2e-2, rel_tol=2e-2
        )


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(data=st.data())
def test_any_shape(data: st.DataObject):
    sizes = Sizes(
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 64)),
        data.draw(st.sampled_from((64, 128))),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 128)),
    )
    check(
        decode,
        data.draw(st.sampled_from(list(FORMATS))),
        data.draw(st.lists(st.integers(-1, 700), min_size=1, max_size=4)),
        sizes,
        causal=data.draw(st.booleans()),
        num_splits=data.draw(st.sampled_from((None, 1, 2, 4))),
    )


def test_vmap_and_derivatives():
    q, rows, paging = case("bf16", [100, 200], Sizes(2, 8, 128, 2, 64))
    table, lengths = jnp.asarray(paging.table), jnp.array([100, 200], jnp.int32)
    some = jnp.stack([q, q * 2, -q])
    one = lambda q: decode(q, rows, table, lengths, sm_scale=0.1, num_splits=1)  # noqa: E731
    together = jax.vmap(one)(some)
    for i in range(3):
        same_bits(jax.tree.map(lambda x, i=i: x[i], together), one(some[i]))

    def loss(q: jax.Array, implementation: Any) -> jax.Array:
        out, lse = gqa_decode(q, rows, table, lengths, sm_scale=0.1, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

    ours, xla = (np.asarray(jax.grad(loss)(q, each), np.float32) for each in ("mosaic_gpu", "xla"))
    # What reaches the derivative is the output in bf16, which may be the next number here.
    assert np.linalg.norm(ours - xla) <= 1e-2 * np.linalg.norm(xla)


def test_none_is_the_kernel_here():
    q, rows, paging = case("fp4", [100, 200], Sizes(2, 16, 128, 1, 64))
    table, lengths = jnp.asarray(paging.table), jnp.array([100, 200], jnp.int32)
    same_bits(
        gqa_decode(q, rows, table, lengths, sm_scale=0.1),
        decode(q, rows, table, lengths, sm_scale=0.1),
    )
