"""The query side of the indexer through XLA, pooled keys, and which calls reach the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla.layouts import IndexKeyRows
from tests.selection.query_cases import CASES, Case


@pytest.mark.parametrize("case", CASES[1:3])
def test_prepared_queries(case: Case):
    """XLA may fuse a product with a sum: a rotated value then differs in its last bit."""
    raw = case.draw()
    codes, weights = jmla.prepare_index_query(
        raw,
        hadamard=case.hadamard,
        scale_format="pow2" if case.pow2 else "fp32",
        implementation="xla",
    )
    wanted, wanted_weights = case.expected(raw)
    nan = wanted & 0x7F == 0x7F
    got = np.asarray(codes).view(np.uint8)
    assert (got != wanted)[~nan].mean() < 0.02
    np.testing.assert_allclose(weights, wanted_weights, rtol=1e-2)


def test_a_hadamard_rotation_is_an_orthogonal_matrix():
    eye = jnp.eye(128, dtype=jnp.float32)
    matrix = np.asarray(jmla.hadamard_rotation(eye), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(128), atol=1e-6)
    assert (np.abs(matrix) == np.float32(128**-0.5)).all()
    np.testing.assert_array_equal(matrix[1] > 0, np.arange(128) % 2 == 0)
    with pytest.raises(ValueError, match=r"x\.shape=\(3, 96\): expected a power of two"):
        jmla.hadamard_rotation(jnp.zeros((3, 96)))


def test_the_cache_says_whether_its_keys_are_rotated():
    cache = jmla.init_cache(
        jmla.KVLayout.BF16, num_pages=2, rank=64, rope_dim=64, index_dim=64, index_hadamard=True
    )
    assert isinstance(cache.index_keys, IndexKeyRows)
    assert cache.index_keys.hadamard
    assert cache.index_keys.gather(jnp.zeros(3, jnp.int32)).hadamard
    plain = IndexKeyRows.zeros(cache.index_keys.shape, dim=64)
    structures: list[object] = [jax.tree.structure(x) for x in (plain, cache.index_keys)]
    assert structures[0] != structures[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 32, "rope_dim": 32}, "heads of"),
        ({"rope_dim": 24}, "rope_dim=24"),
        ({"tokens": 1, "dim": 256}, "heads of"),
    ],
)
def test_what_the_kernel_does_not_serve(change: dict[str, int], reason: str):
    raw = Case(**{"tokens": 2, "heads": 2, "hadamard": False, **change}).draw()  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=reason):
        jmla.prepare_index_query(raw, implementation="mosaic_gpu")
    codes, _ = jmla.prepare_index_query(raw, implementation="xla")
    assert codes.shape == raw.values.shape


def test_shapes_that_do_not_fit():
    raw = Case().draw()
    with pytest.raises(ValueError, match="expected"):
        jmla.prepare_index_query(
            jmla.RawIndexQueries(raw.values, raw.weights[:, :1], raw.cos, raw.sin, interleaved=True)
        )
    with pytest.raises(ValueError, match="expected"):
        jmla.prepare_index_query(
            jmla.RawIndexQueries(raw.values, raw.weights, raw.cos[:1], raw.sin, interleaved=True)
        )


def test_pools_and_their_tokens():
    keys = jnp.arange(12, dtype=jnp.float32).reshape(6, 2)
    np.testing.assert_array_equal(jmla.pool_index_keys(keys, 3), [[2, 3], [8, 9]])
    pools = jnp.array([[0, 2, -1], [1, 2, 3], [-1, -1, -1], [-1, -1, -1]])
    got = jmla.expand_pools(pools, jnp.array([7, 9, 1, -3], jnp.int32), 2)
    wanted = [
        [0, 1, 4, 5, 6, -1, -1],
        [2, 3, 4, 5, 6, 7, 8],
        [0, -1, -1, -1, -1, -1, -1],
        [-1, -1, -1, -1, -1, -1, -1],
    ]
    np.testing.assert_array_equal(got, wanted)
    with pytest.raises(ValueError, match="multiple of pool"):
        jmla.pool_index_keys(keys, 4)
    with pytest.raises(ValueError, match="pool=0"):
        jmla.expand_pools(pools, jnp.zeros(4, jnp.int32), 0)
