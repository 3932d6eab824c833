"""select_topk against a plain sort, for every kind of score and window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, PartitionSpec

from jmla.topk import identity_topk, select_topk

INT_MAX = np.iinfo(np.int32).max
INT_MIN = np.iinfo(np.int32).min
# Few values, so that ties are the rule; both zeros, subnormals, NaN of both signs.
PALETTE = np.array(
    [np.nan, -np.nan, -np.inf, np.inf, -0.0, 0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38],
    np.float32,
)

jitted_select_topk = jax.jit(select_topk, static_argnames="k")


def oracle(scores: np.ndarray, lengths: np.ndarray, k: int, starts: np.ndarray) -> np.ndarray:
    """Python's stable sort by falling score, NaN last; the chosen positions ascending."""
    rows, columns = scores.shape
    out = np.full((rows, k), -1, np.int32)
    for i in range(rows):
        start = min(max(int(starts[i]), 0), columns)
        length = min(max(int(lengths[i]), 0), columns - start)
        with np.errstate(invalid="ignore"):  # signalling NaN
            window = scores[i, start : start + length].astype(np.float64).tolist()
        chosen = list(range(length))
        if length > k:
            chosen = sorted(
                range(length),
                key=lambda p: (1, 0.0) if window[p] != window[p] else (0, -window[p]),
            )[:k]
        out[i, : len(chosen)] = sorted(chosen)
    return out


def check(scores: np.ndarray, lengths: np.ndarray, k: int, starts: np.ndarray | None) -> None:
    got = jitted_select_topk(
        jnp.asarray(scores),
        jnp.asarray(lengths),
        k=k,
        row_starts=None if starts is None else jnp.asarray(starts),
    )
    assert got.dtype == jnp.int32
    if starts is None:
        starts = np.zeros_like(lengths)
    np.testing.assert_array_equal(got, oracle(scores, lengths, k, starts))


@given(data=st.data())
def test_ties_nan_and_infinities(data: st.DataObject) -> None:
    rows, columns = 3, data.draw(st.sampled_from([5, 32, 70]))
    k = data.draw(st.sampled_from([3, 40]))
    choice = data.draw(hnp.arrays(np.int64, (rows, columns), elements=st.integers(0, 11)))
    lengths = data.draw(hnp.arrays(np.int32, (rows,), elements=st.integers(-2, columns + 3)))
    starts = data.draw(hnp.arrays(np.int32, (rows,), elements=st.integers(-1, columns + 1)))
    check(PALETTE[choice], lengths, k, starts)


@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([1, 64, 256]), all_bits=st.booleans())
def test_random_scores(seed: int, k: int, all_bits: bool) -> None:
    rng = np.random.default_rng(seed)
    if all_bits:
        scores = rng.integers(0, 2**32, (3, 333), np.uint32).view(np.float32)
    else:
        scores = rng.standard_normal((3, 333), np.float32)
    lengths = np.array([333, k, k + 1], np.int32)
    check(scores, lengths, k, np.array([0, 5, 20], np.int32))


def test_every_length_around_k() -> None:
    k, columns = 4, 9
    lengths = np.array([INT_MIN, -1, 0, 3, 4, 5, 9, 10, INT_MAX], np.int32)
    scores = np.random.default_rng(0).standard_normal((9, columns), np.float32)
    check(scores, lengths, k, None)
    check(scores, lengths, k, np.full(9, 2, np.int32))
    check(scores, lengths, k, np.array([INT_MIN, INT_MAX, -1, 8, 9, 4, 5, 1, 0], np.int32))


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_garbage_outside_the_window_is_never_chosen(garbage: float) -> None:
    scores = np.full((2, 100), garbage, np.float32)
    scores[0, 10:40] = -np.inf
    scores[1, 60:100] = np.nan
    got = select_topk(
        jnp.asarray(scores),
        jnp.array([30, 40], jnp.int32),
        8,
        row_starts=jnp.array([10, 60], jnp.int32),
    )
    np.testing.assert_array_equal(got, np.tile(np.arange(8), (2, 1)))


def test_lengths_up_to_k_ignore_scores() -> None:
    lengths = jnp.array([0, 1, 7, 8], jnp.int32)
    scores = jnp.full((4, 50), jnp.nan, jnp.float32)
    got = select_topk(scores, lengths, 8)
    np.testing.assert_array_equal(got, identity_topk(lengths, 8))
    np.testing.assert_array_equal(got[2], [0, 1, 2, 3, 4, 5, 6, -1])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    got = select_topk(jnp.zeros(shape), jnp.full(shape[0], 4, jnp.int32), 3)
    np.testing.assert_array_equal(got, np.full((shape[0], 3), -1))


def test_many_rows_cross_the_blocks_of_the_cpu_path() -> None:
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((147, 4001), np.float32)
    lengths = rng.integers(0, 4002, 147).astype(np.int32)
    check(scores, lengths, 100, None)


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    rng = np.random.default_rng(2)
    scores = jnp.asarray(rng.standard_normal((5, 300), np.float32))
    lengths = jnp.full(5, 300, jnp.int32)
    whole = jitted_select_topk(scores, lengths, k=16)
    for i in range(5):
        one = jitted_select_topk(scores[i : i + 1], lengths[i : i + 1], k=16)
        np.testing.assert_array_equal(one[0], whole[i])


def test_jit_vmap_export_shard_map() -> None:
    rng = np.random.default_rng(3)
    scores = jnp.asarray(rng.standard_normal((2, 4, 65), np.float32))
    lengths = jnp.asarray(rng.integers(0, 66, (2, 4)), jnp.int32)

    def select(scores: jax.Array, lengths: jax.Array) -> jax.Array:
        return select_topk(scores, lengths, 9)

    want = np.stack([select(s, n) for s, n in zip(scores, lengths, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(select))(scores, lengths), want)
    exported = jax.export.export(jax.jit(select), platforms=("cpu", "cuda"))(scores[0], lengths[0])
    np.testing.assert_array_equal(exported.call(scores[0], lengths[0]), want[0])
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    spec = PartitionSpec("rows")
    sharded = jax.jit(jax.shard_map(select, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(
        scores[0], lengths[0]
    )
    np.testing.assert_array_equal(sharded, want[0])


def test_prefill_memory_stays_near_the_scores() -> None:
    scores = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    lengths = jax.ShapeDtypeStruct((4096,), jnp.int32)
    compiled = jax.jit(lambda s, n: select_topk(s, n, 256)).lower(scores, lengths).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # 64 MiB of scores: their keys alone, where the rows are not done in blocks. A sort needs twice
    # that, for its keys and its positions.
    assert analysis.temp_size_in_bytes < (16 if jax.default_backend() == "cpu" else 80) << 20


def test_wrong_arguments() -> None:
    scores, lengths = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"scores\.shape"):
        select_topk(scores[0], lengths, 2)
    with pytest.raises(ValueError, match=r"scores\.dtype"):
        select_topk(scores.astype(jnp.bfloat16), lengths, 2)
    with pytest.raises(ValueError, match=r"lengths: got int32\[1\], expected int32\[2\]"):
        select_topk(scores, lengths[:1], 2)
    with pytest.raises(ValueError, match="row_starts: got float32"):
        select_topk(scores, lengths, 2, row_starts=jnp.zeros(2))
    with pytest.raises(ValueError, match="k=0"):
        select_topk(scores, lengths, 0)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        select_topk(scores, lengths, 2, implementation="cuda")
    with pytest.raises(NotImplementedError, match="k=4097: the mosaic_gpu kernel selects at most"):
        select_topk(scores, lengths, 4097, implementation="mosaic_gpu")
    wide = jax.ShapeDtypeStruct((2, (1 << 20) + 1), jnp.float32)
    with pytest.raises(NotImplementedError, match="rows of at most 1048576"):
        jax.eval_shape(lambda x: select_topk(x, lengths, 2, implementation="mosaic_gpu"), wide)
