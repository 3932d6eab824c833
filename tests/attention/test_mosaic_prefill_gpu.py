"""Sparse prefill through the Hopper kernels on a Hopper, against f64."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import _mosaic_prefill
from jmla.attention import sparse_prefill
from jmla.layouts import Rows
from tests.attention.cases import (
    INT_MAX,
    INT_MIN,
    PREFILL_FILES,
    SCALE,
    golden_prefill,
    random_indices,
    same_bits,
)
from tests.attention.cases import random_queries as queries_of_width
from tests.attention.exact import (
    BF16,
    FORMATS,
    FP4,
    FP32,
    POW2,
    V4,
    assert_exact_prefill,
    exact_prefill,
    poison_all,
    rows_of,
)
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("hopper")

random_queries = functools.partial(queries_of_width, width=576)
LOGIT_OF_FP32_SCALES = 2e-3  # see sparse decode


@pytest.fixture(params=["own", "decode"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose blocks every call of the test runs, whatever is the faster."""
    from pallas_kernels.sparse_prefill import call

    monkeypatch.setattr(call, "is_for_own_blocks", lambda *_: request.param == "own")
    fresh = jax.jit(lambda *args: _mosaic_prefill._attend(*args))
    monkeypatch.setattr(_mosaic_prefill, "_compiled", fresh)
    return request.param


def prefill(q: jax.Array, rows: Rows, indices: jax.Array, **options: Any):
    return sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="mosaic_gpu", **options)


def check(q: jax.Array, rows: Rows, indices: jax.Array, **options: Any):
    ours = prefill(q, rows, indices, **options)
    exact = exact_prefill(q, rows, indices, sm_scale=SCALE, **options)
    assert_exact_prefill(ours, exact)
    return ours


@pytest.mark.parametrize(
    ("n", "heads", "topk"),
    [
        (3, 1, 1),
        (2, 16, 63),
        (5, 64, 64),
        (2, 65, 65),
        (3, 128, 200),
        (2, 40, 2048),
        (300, 70, 130),
    ],
)
def test_against_f64(blocks: str, n: int, heads: int, topk: int):
    """The last has more tasks than a launch of the kernel's own blocks."""
    indices = random_indices(2, n, topk, slots=2257)
    rows = poison_all(rows_of(BF16, 1, 37, 61), indices)
    check(random_queries(0, n, heads), rows, indices)


@pytest.mark.parametrize("form", [*FORMATS[:3], FP4, V4])
@pytest.mark.parametrize("heads", [8, 70])
def test_rows_of_every_layout(form, heads: int):
    indices = random_indices(2, 140, 200, slots=2257)
    rows = poison_all(rows_of(form, 1, 37, 61), indices)
    q = queries_of_width(0, 140, heads, width=rows.width)
    ours, exact = prefill(q, rows, indices), exact_prefill(q, rows, indices, sm_scale=SCALE)
    assert_exact_prefill(ours, exact, lse_abs=LOGIT_OF_FP32_SCALES if form is FP32 else 1e-5)


@pytest.mark.parametrize("name", PREFILL_FILES)
def test_flashmlas_own_results(blocks: str, name: str):
    case = golden_prefill(name)
    if case.args[1].rope_dim == 0:
        with pytest.raises(NotImplementedError, match=r"512 \+ 64"):
            sparse_prefill(*case.args, **case.kwargs, implementation="mosaic_gpu")
        return
    ours = sparse_prefill(*case.args, **case.kwargs, implementation="mosaic_gpu")
    wanted = [case.expected[name] for name in ("out", "max_logits", "lse")]
    assert_close(ours[0], wanted[0], abs_tol=8e-4, rel_tol=3.01 / 128, cos_tol=7e-6)
    for mine, theirs in zip(ours[1:], wanted[1:], strict=True):
        assert_close(mine, theirs, abs_tol=1e-5, rel_tol=2.01 / 65536)


def test_lengths_and_sinks(blocks: str):
    """Of no key, and of infinite sinks, among many tasks of a block."""
    n, heads = 400, 5
    some = np.array([0, 1, 63, 64, 65, 128, 129, 200, 1000, -5, INT_MAX, INT_MIN], np.int32)
    lengths = some[np.random.default_rng(0).integers(0, len(some), n)]
    indices = random_indices(2, n, 200, slots=512)
    used = np.where(np.arange(200) < lengths[:, None], np.asarray(indices), -1)
    rows = poison_all(rows_of(BF16, 1, 8, 64), used)
    sink = jnp.array([0.5, np.inf, -np.inf, 9.0, -3.0], jnp.float32)
    options = {"topk_length": jnp.asarray(lengths), "attn_sink": sink}
    q = random_queries(0, n, heads)
    out, top, lse = check(q, rows, indices, **options)
    same_bits(out[:, 1], jnp.zeros_like(out[:, 1]))
    plain = prefill(q, rows, indices, topk_length=options["topk_length"])
    same_bits((out[:, 2], top, lse), (plain[0][:, 2], *plain[1:]))


def test_nothing_to_attend_gives_zero_and_minus_infinity(blocks: str):
    rows = poison_all(rows_of(BF16, 1, 8))
    bad = jnp.array([-1, INT_MIN, 8, INT_MAX, -123456, 9], jnp.int32)
    indices = bad[jnp.arange(3 * 130).reshape(3, 130) % 6]
    for sink in (None, 0.5, float("inf"), float("-inf")):
        sinks = None if sink is None else jnp.full(26, sink, jnp.float32)
        out, top, lse = prefill(random_queries(0, 3, 26), rows, indices, attn_sink=sinks)
        same_bits(out, jnp.zeros((3, 26, 512), jnp.bfloat16))
        assert np.isneginf(np.asarray(top)).all() and np.isneginf(np.asarray(lse)).all()


def test_nan_in_a_named_row_reaches_its_results_alone(blocks: str):
    """NaN in the other rows is in every test above; this shows that those would see it."""
    indices = random_indices(2, 3, 130, slots=300, bad=0)
    hidden = int(indices[1, 77])
    indices = jnp.where((indices == hidden) & (jnp.arange(3)[:, None] != 1), 5, indices)
    rows = poison_all(rows_of(BF16, 1, 300), np.delete(np.arange(300), hidden))
    for each in prefill(random_queries(0, 3, 26), rows, indices):
        nan = np.isnan(np.asarray(each, np.float32))
        assert nan[1].all() and not nan[[0, 2]].any()


def test_any_scale(blocks: str):
    indices = random_indices(2, 20, 300, slots=512)
    rows, q = rows_of(BF16, 1, 8, 64), random_queries(0, 20, 6) * jnp.bfloat16(0.25)
    for scale in (-0.6, 0.0, 1e-3, 8.0):
        ours = sparse_prefill(q, rows, indices, sm_scale=scale, implementation="mosaic_gpu")
        exact = exact_prefill(q, rows, indices, sm_scale=scale)
        assert_exact_prefill(ours, exact, lse_abs=1e-4)


def test_a_row_has_the_same_bits_in_every_batch(blocks: str):
    q, rows = random_queries(0, 500, 30), rows_of(BF16, 1, 700)
    indices = random_indices(2, 500, 300, slots=700)
    together = prefill(q, rows, indices)
    same_bits(prefill(q, rows, indices), together)
    order = np.random.default_rng(0).permutation(500)
    shuffled = prefill(q[order], rows, indices[order])
    same_bits(shuffled, jax.tree.map(lambda x: x[order], together))


@hypothesis.settings(
    max_examples=6, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_any_shape_and_any_indices(blocks: str, data: st.DataObject):
    n, heads = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 130))
    topk, bad = data.draw(st.integers(1, 400)), data.draw(st.floats(0, 1))
    indices = random_indices(topk, n, topk, slots=333, bad=bad)
    rows = poison_all(rows_of(BF16, heads, 333), indices)
    lengths = np.random.default_rng(topk).integers(-1, topk + 2, n).astype(np.int32)
    check(random_queries(topk, n, heads), rows, indices, topk_length=jnp.asarray(lengths))


def test_more_than_65535_queries(blocks: str):
    """A grid's second and third axis end there."""
    count = 70_000
    q, rows = random_queries(0, count, 1), rows_of(BF16, 1, 300)
    indices = random_indices(2, count, 64, slots=300)
    ours = prefill(q, rows, indices)
    some = np.array([0, 1, 65_534, 65_535, 65_536, 69_999])
    exact = exact_prefill(q[some], rows, indices[some], sm_scale=SCALE)
    assert_exact_prefill(tuple(x[some] for x in ours), exact)


def test_none_is_the_kernel_here():
    q, rows = random_queries(0, 2, 16), rows_of(POW2, 1, 64)
    indices = random_indices(2, 2, 60, slots=64)
    traced = jax.make_jaxpr(lambda q: sparse_prefill(q, rows, indices, sm_scale=SCALE))(q)
    assert "custom_vmap_call" in str(traced)
    same_bits(sparse_prefill(q, rows, indices, sm_scale=SCALE), prefill(q, rows, indices))


def test_the_xla_path_agrees():
    """What a plan gives on Hopper and elsewhere: alike but for the rounding of keys to bf16."""
    q, indices = random_queries(0, 150, 64), random_indices(2, 150, 500, slots=900)
    for form in FORMATS:
        rows = rows_of(form, 1, 900)
        xla = sparse_prefill(q, rows, indices, sm_scale=SCALE, implementation="xla")
        ours = prefill(q, rows, indices)
        assert_close(ours[0], xla[0], abs_tol=2e-3, rel_tol=2.01 / 128, cos_tol=2e-5)
        assert_close(ours[1], xla[1], abs_tol=1e-2, rel_tol=1e-3)  # of a single key
        assert_close(ours[2], xla[2], abs_tol=1e-3, rel_tol=1e-3)
