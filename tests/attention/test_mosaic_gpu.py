"""The Hopper kernel of sparse decode on a Hopper, against f64 over exactly dequantised rows."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.attention import sparse_decode
from jmla.layouts import Rows
from tests.attention.cases import (
    DECODE_FILES,
    INT_MAX,
    INT_MIN,
    SCALE,
    golden_decode,
    random_indices,
    same_bits,
)
from tests.attention.cases import random_queries as queries_of_width
from tests.attention.exact import (
    BF16,
    FORMATS,
    FP8,
    FP32,
    POW2,
    SCALED_FP8,
    assert_exact,
    exact_decode,
    poison_all,
    relative_error,
    rows_of,
)
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("hopper")

random_queries = functools.partial(queries_of_width, width=576)
KINDS = dict(zip(("pow2", "fp32", "fp8", "bf16"), FORMATS, strict=True))
# Narrow blocks and, with `num_splits` given, wide ones.
both_kinds = pytest.mark.parametrize("heads", [26, 52])
every_format = pytest.mark.parametrize("form", KINDS.values(), ids=KINDS)

# A product of an fp32 scale and a code is rounded to 11 bits: one key's logit shows it.
SINGLE_KEY_LSE = 2e-3


def decode(q: jax.Array, rows: Rows, indices: jax.Array, **options: Any):
    return sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="mosaic_gpu", **options)


def take(results: tuple[jax.Array, jax.Array], where: Any) -> tuple[jax.Array, jax.Array]:
    out, lse = results
    return out[where], lse[where]


# Each format with heads on both sides of the tiles, lists on both sides of the blocks of keys, and
# splits; every value of each occurs, and pairs of neighbours do.
HEADS = (1, 7, 8, 16, 20, 40, 64, 70, 128)
TOPKS = (1, 63, 64, 65, 200, 2048)
SPLITS = (None, 1, 2, 5)
CASES = [
    ((*FORMATS, FP8)[i % 5], HEADS[i % 9], TOPKS[(i + i // 6) % 6], SPLITS[(i + i // 5) % 4])
    for i in range(25)
] + [(form, 128, 2048, None) for form in FORMATS]


@pytest.mark.parametrize(("form", "heads", "topk", "splits"), CASES)
def test_against_f64(form, heads: int, topk: int, splits: int | None):
    indices = random_indices(2, 3, 2, topk, slots=2257)
    rows = poison_all(rows_of(form, 1, 37, 61), indices)
    q = random_queries(0, 3, 2, heads)
    ours = decode(q, rows, indices, num_splits=splits)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    coarse = form is FP32 and topk == 1
    assert_exact(ours, exact, lse_abs=SINGLE_KEY_LSE if coarse else 1e-5)


@pytest.mark.parametrize("name", DECODE_FILES[:4])
@pytest.mark.parametrize("splits", [None, 3])
def test_flashmlas_own_results(name: str, splits: int | None):
    case = golden_decode(name)
    out, lse = sparse_decode(
        *case.args, **case.kwargs, num_splits=splits, implementation="mosaic_gpu"
    )
    assert_close(out, case.expected["out"], abs_tol=1e-3, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(lse, case.expected["lse"], abs_tol=1e-6, rel_tol=8.01 / 65536)


@every_format
@both_kinds
@pytest.mark.parametrize("splits", [1, 3])
def test_lengths_of_requests_and_of_tokens(form, heads: int, splits: int):
    q, indices = random_queries(0, 4, 2, heads), random_indices(2, 4, 2, 200, slots=512)
    for lengths in ([0, 1, 1000, -5], [[0, 1], [64, 65], [INT_MAX, 200], [INT_MIN, 199]]):
        wide = np.broadcast_to(np.reshape(lengths, (4, -1)), (4, 2))[..., None]
        used = np.where(np.arange(200) < wide, np.asarray(indices), -1)
        rows = poison_all(rows_of(form, 1, 8, 64), used)
        given = jnp.array(lengths, jnp.int32)
        ours = decode(q, rows, indices, topk_length=given, num_splits=splits)
        exact = exact_decode(q, [(rows, indices, given)], sm_scale=SCALE)
        assert_exact(ours, exact, lse_abs=SINGLE_KEY_LSE if form is FP32 else 1e-5)


@every_format
@both_kinds
@pytest.mark.parametrize("splits", [1, 2])
def test_nothing_to_attend_gives_zero_and_minus_infinity(form, heads: int, splits: int):
    rows = poison_all(rows_of(form, 1, 8))
    bad = jnp.array([-1, INT_MIN, 8, INT_MAX, -123456, 9], jnp.int32)
    indices = bad[jnp.arange(3 * 130).reshape(3, 1, 130) % 6]
    for sink in (None, 0.5, float("inf"), float("-inf")):
        sinks = None if sink is None else jnp.full(heads, sink, jnp.float32)
        q = random_queries(0, 3, 1, heads)
        out, lse = decode(q, rows, indices, attn_sink=sinks, num_splits=splits)
        same_bits(out, jnp.zeros((3, 1, heads, 512), jnp.bfloat16))
        assert np.isneginf(np.asarray(lse)).all()


@every_format
@both_kinds
@pytest.mark.parametrize("splits", [1, 2])
def test_sinks(form, heads: int, splits: int):
    """An infinite sink takes everything or nothing; lse does not see any."""
    q, rows = random_queries(0, 2, 1, heads), rows_of(form, 1, 300)
    indices = random_indices(2, 2, 1, 130, slots=300)
    sink = np.linspace(-3, 9, heads).astype(np.float32)
    sink[::5], sink[1::5] = np.inf, -np.inf
    ours = decode(q, rows, indices, attn_sink=jnp.asarray(sink), num_splits=splits)
    plain = decode(q, rows, indices, num_splits=splits)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE, attn_sink=sink)
    assert_exact(ours, exact)
    same_bits(ours[1], plain[1])
    same_bits(ours[0][:, :, ::5], jnp.zeros_like(ours[0][:, :, ::5]))
    same_bits(ours[0][:, :, 1::5], plain[0][:, :, 1::5])


@every_format
@both_kinds
def test_nan_in_a_named_row_reaches_its_results_alone(form, heads: int):
    """NaN in the other rows is in every test above; this shows that those would see it."""
    indices = random_indices(2, 3, 1, 130, slots=300, bad=0)
    hidden = int(indices[1, 0, 77])
    indices = jnp.where((indices == hidden) & (jnp.arange(3)[:, None, None] != 1), 5, indices)
    rows = poison_all(rows_of(form, 1, 300), np.delete(np.arange(300), hidden))
    out, lse = decode(random_queries(0, 3, 1, heads), rows, indices, num_splits=1)
    nan = np.isnan(np.asarray(out, np.float32)).all(-1), np.isnan(np.asarray(lse))
    assert nan[0][1].all() and nan[1][1].all()
    assert np.isfinite(np.asarray(out, np.float32)[[0, 2]]).all()
    assert np.isfinite(np.asarray(lse)[[0, 2]]).all()


@every_format
@both_kinds
def test_duplicates_count_as_often_as_they_occur(form, heads: int):
    q, rows = random_queries(0, 1, 1, heads), rows_of(form, 1, 40)
    once = jnp.array([[[7, 31]]], jnp.int32)
    twice, uneven = jnp.tile(once, (1, 1, 40)), jnp.array([[[7, 31, 7]]], jnp.int32)
    ours, single = (decode(q, rows, slots, num_splits=1) for slots in (twice, once))
    assert_close(ours[0], single[0], abs_tol=1e-3, rel_tol=8e-3)
    assert_close(ours[1], single[1] + np.float32(np.log(40)), abs_tol=1e-5, rel_tol=1e-6)
    exact = exact_decode(q, [(rows, uneven, None)], sm_scale=SCALE)
    lse_abs = SINGLE_KEY_LSE if form is FP32 else 1e-5
    assert_exact(decode(q, rows, uneven, num_splits=1), exact, lse_abs=lse_abs)


@pytest.mark.parametrize(
    ("form", "extra_form"), [(POW2, BF16), (BF16, FP32), (FP32, SCALED_FP8), (FP8, POW2)]
)
@pytest.mark.parametrize("splits", [None, 2])
def test_a_second_cache_in_another_layout(form, extra_form, splits: int | None):
    q = random_queries(0, 3, 2, 40)
    indices, more = (
        random_indices(s, 3, 2, k, slots=n) for s, k, n in ((2, 70, 448), (3, 300, 90))
    )
    rows = poison_all(rows_of(form, 1, 7, 64), indices)
    extra = rows_of(extra_form, 4, 45, 2)
    lengths, sink = jnp.array([0, 130, 999], jnp.int32), jnp.linspace(-2, 2, 40, dtype=jnp.float32)
    # A request that has nothing in the first cache, and one that has nothing in either.
    indices = indices.at[0].set(-1)
    ours = decode(
        q,
        rows,
        indices,
        attn_sink=sink,
        extra_rows=extra,
        extra_indices=more,
        extra_topk_length=lengths,
        num_splits=splits,
    )
    caches = [(rows, indices, None), (extra, more, lengths)]
    exact = exact_decode(q, caches, sm_scale=SCALE, attn_sink=sink)
    assert_exact(ours, exact)
    assert np.isneginf(np.asarray(ours[1][0])).all()


@every_format
@pytest.mark.parametrize("heads", [30, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(form, heads: int, splits: int):
    """Among 150 queries other tiles of 30 heads are chosen than for one."""
    q, rows = random_queries(0, 150, 1, heads), rows_of(form, 1, 700)
    indices = random_indices(2, 150, 1, 300, slots=700)
    together = decode(q, rows, indices, num_splits=splits)
    same_bits(decode(q, rows, indices, num_splits=splits), together)
    order = np.random.default_rng(0).permutation(150)
    same_bits(decode(q[order], rows, indices[order], num_splits=splits), take(together, order))
    for i in (0, 77, 149):
        one = slice(i, i + 1)
        alone = decode(q[one], rows, indices[one], num_splits=splits)
        same_bits(alone, take(together, one))


@every_format
@pytest.mark.parametrize(("all_heads", "fewer"), [(32, (1, 16, 17)), (128, (33, 64, 65))])
def test_the_first_heads_do_not_depend_on_the_others(form, all_heads: int, fewer: tuple[int, ...]):
    """Among blocks of one kind; 32 is where the kinds meet."""
    q, rows = random_queries(0, 5, 1, all_heads), rows_of(form, 1, 300)
    indices = random_indices(2, 5, 1, 200, slots=300)
    together = decode(q, rows, indices, num_splits=2)
    for heads in fewer:
        some = decode(q[:, :, :heads], rows, indices, num_splits=2)
        same_bits(some, take(together, np.s_[:, :, :heads]))


@every_format
@both_kinds
def test_heads_of_very_different_magnitude(form, heads: int):
    """From one whose keys all weigh the same to one that attends to a single key."""
    size = jnp.logspace(-6, 6, heads, dtype=jnp.float32)
    q = random_queries(0, 2, 1, heads).astype(jnp.float32) * size[None, None, :, None]
    q = q.astype(jnp.bfloat16)
    rows, indices = rows_of(form, 1, 600), random_indices(2, 2, 1, 300, slots=600)
    out, lse = decode(q, rows, indices, num_splits=1)
    exact_out, exact_lse = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    largest = np.abs(exact_lse)
    difference = np.abs(np.asarray(lse, np.float64) - exact_lse)
    # Relative to the largest products that were summed, which an lse near zero does not show.
    bound = 8.01 / 65536 * np.maximum(largest, np.asarray(size)[None, None])
    if form is FP32:  # a key times its scale has 11 bits, and one key may be all of a head's lse
        bound = bound + 2e-3 * np.asarray(size)[None, None]
    assert (difference <= bound).all()
    calm = np.asarray(size) < 3.0
    error = relative_error(np.asarray(out, np.float64)[:, :, calm], exact_out[:, :, calm])
    # The rounding of bf16 weights adds to that of the output.
    assert error <= (2.6e-3 if form is BF16 else 2.3e-3)
    # Beyond, the rounding of a logit moves weight between neighbours; out stays among the values.
    assert np.isfinite(np.asarray(out, np.float32)).all()
    spread = np.abs(exact_out[:, :, -1]).max()
    assert np.abs(np.asarray(out, np.float32)[:, :, ~calm]).max() < 4 * spread


@pytest.mark.parametrize("form", [POW2, FP32], ids=["pow2", "fp32"])
@both_kinds
def test_block_scales_far_apart(form, heads: int):
    """Groups of one row, and rows, whose scales differ by powers of ten."""
    rng = np.random.default_rng(3)
    groups = np.repeat(10.0 ** rng.uniform(-2, 1, (400, 4)), 128, axis=1)
    factors = np.concatenate([groups, np.ones((400, 64))], axis=1) * 10.0 ** rng.uniform(
        -2, 0, (400, 1)
    )
    rows = rows_of(form, 1, 400, factors=factors.astype(np.float32))
    q, indices = random_queries(0, 3, 1, heads), random_indices(2, 3, 1, 150, slots=400)
    out, lse = decode(q, rows, indices, num_splits=1)
    exact_out, exact_lse = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert relative_error(np.asarray(out, np.float64), exact_out) <= 2.5e-3
    # One group makes up a row's logit then, and products with fp32 scales are rounded to 11 bits.
    assert_close(lse, exact_lse, abs_tol=4e-3 if form is FP32 else 1e-5, rel_tol=8.01 / 65536)


@pytest.mark.parametrize("form", [POW2, FP32], ids=["pow2", "fp32"])
@both_kinds
@pytest.mark.parametrize("zeros", [150, 149, 75])
def test_rows_of_a_fresh_cache(form, heads: int, zeros: int):
    """Rows of zeros have scales of zero; their logits are 0, and they count."""
    rows, fresh = rows_of(form, 1, 150), rows_of(form, 1, 150, factors=np.zeros((150, 576)))
    leaves: dict[str, Any] = {
        name: jnp.zeros_like(getattr(fresh, name)) for name in fresh.token_leaves
    }
    written = jnp.arange(150 - zeros, dtype=jnp.int32)
    rows = dataclasses.replace(fresh, **leaves).set(written, rows.gather(written))
    q = random_queries(0, 2, 1, heads)
    indices = jnp.tile(jnp.arange(150, dtype=jnp.int32), (2, 1, 1))
    ours = decode(q, rows, indices, num_splits=1)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert_exact(ours, exact, lse_abs=SINGLE_KEY_LSE if form is FP32 else 1e-5)


@hypothesis.settings(max_examples=15)
@hypothesis.given(data=st.data())
def test_any_shape_and_any_indices(data: st.DataObject):
    form = data.draw(st.sampled_from((*FORMATS, FP8)))
    n, heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 130))
    topk, splits = data.draw(st.integers(1, 700)), data.draw(st.sampled_from((None, 1, 2, 4)))
    bad, spread = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1.5))
    factors = 10.0 ** np.random.default_rng(n).uniform(-spread, 0, (333, 1))
    indices = random_indices(topk, n, 1, topk, slots=333, bad=bad)
    rows = rows_of(form, heads, 333, factors=np.broadcast_to(factors, (333, 576)))
    rows = poison_all(rows, indices)
    lengths = jnp.array(
        data.draw(st.lists(st.integers(-1, 701), min_size=n, max_size=n)), jnp.int32
    )
    q = random_queries(topk, n, 1, heads)
    ours = decode(q, rows, indices, topk_length=lengths, num_splits=splits)
    exact = exact_decode(q, [(rows, indices, lengths)], sm_scale=SCALE)
    assert_exact(ours, exact, lse_abs=SINGLE_KEY_LSE if form is FP32 else 1e-5)


def test_more_than_65535_queries():
    """A grid's second and third axis end there."""
    count = 70_000
    q, rows = random_queries(0, count, 1, 1), rows_of(POW2, 1, 300)
    indices = random_indices(2, count, 1, 64, slots=300)
    ours = decode(q, rows, indices)
    some = np.array([0, 1, 65_534, 65_535, 65_536, 69_999])
    exact = exact_decode(q[some], [(rows, indices[some], None)], sm_scale=SCALE)
    assert_exact(take(ours, some), exact)
    halves = [decode(q[half], rows, indices[half]) for half in (np.s_[:35_000], np.s_[35_000:])]
    same_bits(ours, jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves))


@pytest.mark.parametrize("over", ["queries", "rows"])
def test_vmap(over: str):
    q, indices = random_queries(0, 3, 2, 1, 20), random_indices(2, 3, 2, 1, 70, slots=90)
    form = functools.partial(rows_of, FP32)
    caches = [form(seed, 90) for seed in (5, 6, 7)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    rows, axis = (caches[0], None) if over == "queries" else (stacked, 0)
    one = functools.partial(decode, num_splits=1)
    ours = jax.vmap(one, in_axes=(0, axis, 0))(q, rows, indices)
    for i in range(3):
        mine = caches[0 if over == "queries" else i]
        same_bits(take(ours, i), one(q[i], mine, indices[i]))


@every_format
def test_in_a_jit_that_owns_its_cache(form):
    slots = jnp.array([3, -1, 40], jnp.int32)
    q, indices = random_queries(0, 2, 1, 16), random_indices(2, 2, 1, 60, slots=64)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(rows: Rows, new: Rows) -> tuple[Rows, Any]:
        written = rows.set(slots, new)
        return written, decode(q, written, indices)

    rows, new = rows_of(form, 1, 64), rows_of(form, 5, 3)
    written = rows.set(slots, new)
    wanted = decode(q, written, indices)
    given = jax.tree.map(jnp.copy, rows)
    kept, ours = step(given, new)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given) if leaf.ndim)
    same_bits(kept, written)
    same_bits(ours, wanted)


def test_none_is_the_kernel_here():
    q, rows = random_queries(0, 2, 1, 16), rows_of(POW2, 1, 64)
    indices = random_indices(2, 2, 1, 60, slots=64)
    traced = jax.make_jaxpr(lambda q: sparse_decode(q, rows, indices, sm_scale=SCALE))(q)
    assert "custom_vmap_call" in str(traced)
    same_bits(sparse_decode(q, rows, indices, sm_scale=SCALE), decode(q, rows, indices))


def test_the_xla_path_agrees():
    """What a plan gives on Hopper and elsewhere: alike but for the rounding of keys to bf16."""
    q, indices = random_queries(0, 4, 2, 16), random_indices(2, 4, 2, 500, slots=900)
    for form in FORMATS:
        rows = rows_of(form, 1, 900)
        xla = sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="xla")
        ours = decode(q, rows, indices)
        assert_close(ours[0], xla[0], abs_tol=2e-3, rel_tol=2.01 / 128, cos_tol=2e-5)
        assert_close(ours[1], xla[1], abs_tol=1e-3, rel_tol=1e-3)
