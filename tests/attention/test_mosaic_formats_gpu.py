"""The Hopper kernel over FP4 and FP8_V4 rows, and packed rows of other engines, on a Hopper."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import Cache, append
from jmla.attention import sparse_decode
from jmla.layouts import KVLayout, Rows, from_bytes
from tests.attention.cases import (
    DECODE_FILES,
    SCALE,
    golden_decode,
    random_indices,
    same_bits,
)
from tests.attention.cases import random_queries as queries_of_width
from tests.attention.exact import (
    BF16,
    FP4,
    FP32,
    PACKED_FP32,
    PACKED_POW2,
    PAGED_V4,
    POW2,
    V4,
    assert_exact,
    exact_decode,
    poison_all,
    relative_error,
    rows_of,
)
from tests.helpers import assert_close, golden

pytestmark = pytest.mark.usefixtures("hopper")

PACKED = {"pow2": (PACKED_POW2, POW2), "fp32": (PACKED_FP32, FP32), "v4": (PAGED_V4, V4)}
FORMS = {
    "packed pow2": PACKED_POW2,
    "packed fp32": PACKED_FP32,
    "fp4": FP4,
    "v4": V4,
    "paged v4": PAGED_V4,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
SINGLE_KEY_LSE = 2e-3  # see test_mosaic_gpu
every_packed = pytest.mark.parametrize(("packed", "apart"), PACKED.values(), ids=PACKED)


def random_queries(seed: int, *shape: int, rows: Rows) -> jax.Array:
    return queries_of_width(seed, *shape, width=rows.width)


def decode(q: jax.Array, rows: Rows, indices: jax.Array, **options: Any):
    return sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="mosaic_gpu", **options)


@every_packed
@pytest.mark.parametrize(("heads", "topk"), [(16, 65), (40, 200), (128, 2048)])
def test_packed_rows_have_the_bits_of_rows_apart(packed, apart, heads: int, topk: int):
    indices = random_indices(2, 3, 2, topk, slots=2257)
    rows = poison_all(rows_of(apart, 1, 37, 61), indices)
    q = random_queries(0, 3, 2, heads, rows=rows)
    wanted = decode(q, rows, indices)
    same_bits(decode(q, poison_all(rows_of(packed, 1, 37, 61), indices), indices), wanted)


@every_packed
def test_packed_rows_beside_rows_apart(packed, apart):
    indices, more = random_indices(2, 3, 1, 70, slots=448), random_indices(3, 3, 1, 300, slots=90)
    rows, extra = rows_of(packed, 1, 7, 64), rows_of(apart, 4, 90)
    q, lengths = random_queries(0, 3, 1, 40, rows=rows), jnp.array([0, 130, 999], jnp.int32)
    ours = decode(q, rows, indices, extra_rows=extra, extra_indices=more, extra_topk_length=lengths)
    exact = exact_decode(q, [(rows, indices, None), (extra, more, lengths)], sm_scale=SCALE)
    assert_exact(ours, exact)


@pytest.mark.parametrize("name", DECODE_FILES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("splits", [None, 3])
def test_flashmlas_own_results_from_its_own_bytes(name: str, in_place: bool, splits: int | None):
    data, case = golden(name), golden_decode(name)
    q, rows, indices = case.args
    kwargs = dict(case.kwargs)
    if in_place and rows.layout is KVLayout.FP8_V4:
        pages = [(data["packed"], data["block_size"])]
        pages += (
            [(data["extra_packed"], data["extra_block_size"])] if "extra_rows" in kwargs else []
        )
        stay = [
            from_bytes(jnp.asarray(packed), rows.layout, page_size=int(size), in_place=True)
            for packed, size in pages
        ]
        rows, kwargs = stay[0], kwargs | ({"extra_rows": stay[1]} if stay[1:] else {})
    elif in_place:
        rows = from_bytes(jnp.asarray(data["packed"][:, :, 0]), rows.layout, in_place=True)
    out, lse = sparse_decode(
        q, rows, indices, **kwargs, num_splits=splits, implementation="mosaic_gpu"
    )
    assert_close(out, case.expected["out"], abs_tol=1e-3, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(lse, case.expected["lse"], abs_tol=1e-6, rel_tol=8.01 / 65536)


@every_packed
def test_a_packed_cache_is_updated_and_read_in_one_jit(packed, apart):
    rows, indices = rows_of(packed, 1, 1, 64), random_indices(2, 2, 1, 60, slots=64)
    q, slots = random_queries(0, 2, 1, 16, rows=rows), jnp.array([3, -1, 40], jnp.int32)
    new = random_queries(7, 3, rows=rows) * jnp.bfloat16(0.1)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache: Cache) -> tuple[Cache, Any]:
        written = append(cache, slots, new)
        return written, decode(q, written.rows, indices)

    _, ours = step(Cache(rows))
    kept, wanted = step(Cache(rows_of(apart, 1, 1, 64)))
    same_bits(ours, wanted)
    assert np.isfinite(np.asarray(ours[1])).all()
    assert_exact(ours, exact_decode(q, [(kept.rows, indices, None)], sm_scale=SCALE))


@every_form
@pytest.mark.parametrize(
    ("heads", "topk", "splits"),
    [
        (1, 1, None),
        (7, 63, 1),
        (16, 2048, None),
        (20, 64, 2),
        (32, 65, 1),
        (64, 200, 5),
        (70, 300, 2),
        (128, 2048, None),
        (40, 1000, 1),
        (64, 2048, 1),
    ],
)
def test_against_f64(form, heads: int, topk: int, splits: int | None):
    indices = random_indices(2, 3, 2, topk, slots=2257)
    rows = poison_all(rows_of(form, 1, 37, 61), indices)
    q = random_queries(0, 3, 2, heads, rows=rows)
    ours = decode(q, rows, indices, num_splits=splits)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    coarse = form is PACKED_FP32 and topk == 1
    assert_exact(ours, exact, lse_abs=SINGLE_KEY_LSE if coarse else 1e-5)


@every_form
@pytest.mark.parametrize("splits", [1, 3])
def test_lengths_and_sinks(form, splits: int):
    indices = random_indices(2, 4, 2, 200, slots=512)
    lengths = jnp.array([[0, 1], [64, 65], [999, 200], [-5, 199]], jnp.int32)
    used = np.where(np.arange(200) < np.asarray(lengths)[..., None], np.asarray(indices), -1)
    rows = poison_all(rows_of(form, 1, 8, 64), used)
    q, sink = random_queries(0, 4, 2, 20, rows=rows), np.linspace(-3, 9, 20).astype(np.float32)
    sink[::5], sink[1::5] = np.inf, -np.inf
    ours = decode(
        q, rows, indices, topk_length=lengths, attn_sink=jnp.asarray(sink), num_splits=splits
    )
    exact = exact_decode(q, [(rows, indices, lengths)], sm_scale=SCALE, attn_sink=sink)
    assert_exact(ours, exact, lse_abs=SINGLE_KEY_LSE if form is PACKED_FP32 else 1e-5)


@every_form
def test_a_second_cache(form):
    rows, extra = rows_of(form, 1, 7, 64), rows_of(form, 4, 45, 2)
    indices, more = random_indices(2, 3, 1, 70, slots=448), random_indices(3, 3, 1, 300, slots=90)
    q, lengths = random_queries(0, 3, 1, 40, rows=rows), jnp.array([0, 130, 999], jnp.int32)
    ours = decode(q, rows, indices, extra_rows=extra, extra_indices=more, extra_topk_length=lengths)
    exact = exact_decode(q, [(rows, indices, None), (extra, more, lengths)], sm_scale=SCALE)
    assert_exact(ours, exact)


def test_fp4_beside_bf16():
    rows, extra = rows_of(FP4, 1, 7, 64), rows_of(BF16, 4, 45, 2)
    indices, more = random_indices(2, 3, 1, 70, slots=448), random_indices(3, 3, 1, 300, slots=90)
    q = random_queries(0, 3, 1, 40, rows=rows)
    ours = decode(q, rows, indices, extra_rows=extra, extra_indices=more)
    exact = exact_decode(q, [(rows, indices, None), (extra, more, None)], sm_scale=SCALE)
    assert_exact(ours, exact)


@every_form
def test_nan_in_a_named_row_reaches_its_results_alone(form):
    indices = random_indices(2, 3, 1, 130, slots=300, bad=0)
    hidden = int(indices[1, 0, 77])
    indices = jnp.where((indices == hidden) & (jnp.arange(3)[:, None, None] != 1), 5, indices)
    rows = poison_all(rows_of(form, 1, 300), np.delete(np.arange(300), hidden))
    out, lse = decode(random_queries(0, 3, 1, 20, rows=rows), rows, indices)
    nan = np.isnan(np.asarray(out, np.float32)).all(-1), np.isnan(np.asarray(lse))
    assert nan[0][1].all() and nan[1][1].all()
    assert np.isfinite(np.asarray(out, np.float32)[[0, 2]]).all()
    assert np.isfinite(np.asarray(lse)[[0, 2]]).all()


@every_form
def test_masked_slots_read_nothing_of_the_first_row(form):
    """Masked slots must stand for no row, and not for row 0, which is NaN here."""
    indices = jnp.full((2, 1, 70), -1, jnp.int32).at[:, :, ::7].set(jnp.arange(1, 11))
    rows = poison_all(rows_of(form, 1, 64), np.arange(1, 64))
    q = random_queries(0, 2, 1, 20, rows=rows)
    ours = decode(q, rows, indices)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert_exact(ours, exact, lse_abs=SINGLE_KEY_LSE if form is PACKED_FP32 else 1e-5)


@every_form
def test_rows_and_their_blocks_far_apart(form):
    """Rows, and blocks of 64 values of one row, whose scales differ by powers of ten."""
    rng = np.random.default_rng(3)
    blocks = np.repeat(10.0 ** rng.uniform(-2, 1, (400, 9)), 64, axis=1)
    factors = (blocks * 10.0 ** rng.uniform(-2, 0, (400, 1))).astype(np.float32)
    rows = rows_of(form, 1, 400, factors=factors[:, : form[0].default_rank + 64])
    q, indices = random_queries(0, 3, 1, 40, rows=rows), random_indices(2, 3, 1, 150, slots=400)
    out, lse = decode(q, rows, indices)
    exact_out, exact_lse = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert relative_error(np.asarray(out, np.float64), exact_out) <= 2.5e-3
    lse_abs = 4e-3 if form is PACKED_FP32 else 1e-5
    assert_close(lse, exact_lse, abs_tol=lse_abs, rel_tol=8.01 / 65536)


@every_form
@pytest.mark.parametrize("zeros", [150, 75])
def test_rows_of_a_fresh_cache(form, zeros: int):
    """Rows whose bytes are all zero have logits of 0, and count."""
    if form is PAGED_V4:
        pytest.skip("rows taken from pages stand alone; the bytes are those of the form apart")
    rows = rows_of(form, 1, 150)
    keep = jnp.arange(150) >= zeros
    rows = rows.gather(jnp.where(keep, jnp.arange(150), -1).astype(jnp.int32))
    indices = jnp.tile(jnp.arange(150, dtype=jnp.int32), (2, 1, 1))
    q = random_queries(0, 2, 1, 20, rows=rows)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert_exact(
        decode(q, rows, indices), exact, lse_abs=SINGLE_KEY_LSE if form is PACKED_FP32 else 1e-5
    )


@every_form
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(form, splits: int):
    rows, indices = rows_of(form, 1, 700), random_indices(2, 150, 1, 300, slots=700)
    q = random_queries(0, 150, 1, 64, rows=rows)
    together = decode(q, rows, indices, num_splits=splits)
    same_bits(decode(q, rows, indices, num_splits=splits), together)
    for i in (0, 77, 149):
        one = slice(i, i + 1)
        alone = decode(q[one], rows, indices[one], num_splits=splits)
        same_bits(alone, jax.tree.map(lambda x, one=one: x[one], together))


@every_form
def test_the_xla_path_agrees(form):
    rows, indices = rows_of(form, 1, 900), random_indices(2, 4, 2, 500, slots=900)
    q = random_queries(0, 4, 2, 16, rows=rows)
    xla = sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="xla")
    ours = decode(q, rows, indices)
    assert_close(ours[0], xla[0], abs_tol=2e-3, rel_tol=2.01 / 128, cos_tol=2e-5)
    assert_close(ours[1], xla[1], abs_tol=1e-3, rel_tol=1e-3)


def test_v4_rows_whose_rotary_values_are_the_largest():
    """Values of no position next to nothing beside the rotary ones, and the reverse."""
    for nope, rope in ((1e-3, 300.0), (100.0, 1e-2), (0.0, 50.0)):
        factors = np.concatenate([np.full((90, 448), nope), np.full((90, 64), rope)], axis=1)
        rows = rows_of(V4, 1, 90, factors=factors.astype(np.float32))
        q, indices = random_queries(0, 2, 1, 20, rows=rows), random_indices(2, 2, 1, 70, slots=90)
        q = q * jnp.bfloat16(0.01)
        out, lse = decode(q, rows, indices)
        exact_out, exact_lse = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
        for part in (np.s_[..., :448], np.s_[..., 448:]):
            error = relative_error(np.asarray(out, np.float64)[part], exact_out[part])
            assert error <= 2.5e-3, (nope, rope, part)
        assert_close(lse, exact_lse, abs_tol=1e-5, rel_tol=8.01 / 65536)
