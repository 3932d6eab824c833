"""The Hopper kernel over packed rows, on a Hopper: rows of other engines, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import Cache, append
from jmla.attention import sparse_decode
from jmla.layouts import Rows, from_bytes
from tests.attention.cases import (
    DECODE_FILES,
    SCALE,
    golden_decode,
    random_indices,
    random_queries,
    same_bits,
)
from tests.attention.exact import (
    FP32,
    PACKED_FP32,
    PACKED_POW2,
    POW2,
    assert_exact,
    exact_decode,
    poison_all,
    rows_of,
)
from tests.helpers import assert_close, golden

pytestmark = pytest.mark.usefixtures("hopper")

PACKED = {"pow2": (PACKED_POW2, POW2), "fp32": (PACKED_FP32, FP32)}
every_packed = pytest.mark.parametrize(("packed", "apart"), PACKED.values(), ids=PACKED)


def decode(q: jax.Array, rows: Rows, indices: jax.Array, **options: Any):
    return sparse_decode(q, rows, indices, sm_scale=SCALE, implementation="mosaic_gpu", **options)


@every_packed
@pytest.mark.parametrize(("heads", "topk"), [(16, 65), (40, 200), (128, 2048)])
def test_packed_rows_have_the_bits_of_rows_apart(packed, apart, heads: int, topk: int):
    q = random_queries(0, 3, 2, heads, width=576)
    indices = random_indices(2, 3, 2, topk, slots=2257)
    wanted = decode(q, poison_all(rows_of(apart, 1, 37, 61), indices), indices)
    same_bits(decode(q, poison_all(rows_of(packed, 1, 37, 61), indices), indices), wanted)


@every_packed
def test_packed_rows_beside_rows_apart(packed, apart):
    q, lengths = random_queries(0, 3, 1, 40, width=576), jnp.array([0, 130, 999], jnp.int32)
    indices, more = random_indices(2, 3, 1, 70, slots=448), random_indices(3, 3, 1, 300, slots=90)
    rows, extra = rows_of(packed, 1, 7, 64), rows_of(apart, 4, 90)
    ours = decode(q, rows, indices, extra_rows=extra, extra_indices=more, extra_topk_length=lengths)
    exact = exact_decode(q, [(rows, indices, None), (extra, more, lengths)], sm_scale=SCALE)
    assert_exact(ours, exact)


@pytest.mark.parametrize("name", DECODE_FILES[:4])
def test_flashmlas_own_results_from_its_own_bytes(name: str):
    data, case = golden(name), golden_decode(name)
    layout = case.args[1].layout
    rows = from_bytes(jnp.asarray(data["packed"][:, :, 0]), layout, in_place=True)
    args = (case.args[0], rows, case.args[2])
    out, lse = sparse_decode(*args, **case.kwargs, implementation="mosaic_gpu")
    assert_close(out, case.expected["out"], abs_tol=1e-3, rel_tol=2.01 / 128, cos_tol=5e-6)
    assert_close(lse, case.expected["lse"], abs_tol=1e-6, rel_tol=8.01 / 65536)


@every_packed
def test_a_packed_cache_is_updated_and_read_in_one_jit(packed, apart):
    q, indices = random_queries(0, 2, 1, 16, width=576), random_indices(2, 2, 1, 60, slots=64)
    slots, new = jnp.array([3, -1, 40], jnp.int32), random_queries(7, 3, width=576)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache: Cache) -> tuple[Cache, Any]:
        written = append(cache, slots, new)
        return written, decode(q, written.rows, indices)

    _, ours = step(Cache(rows_of(packed, 1, 1, 64)))
    kept, wanted = step(Cache(rows_of(apart, 1, 1, 64)))
    same_bits(ours, wanted)
    assert np.isfinite(np.asarray(ours[1])).all()
    assert_exact(ours, exact_decode(q, [(kept.rows, indices, None)], sm_scale=SCALE))
