"""Contract 8: jit, vmap, donation, export, shard_map, and no word with the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jmla.attention import dense_decode, merge, sparse_decode, sparse_prefill
from jmla.layouts import BF16Rows
from tests.attention.cases import SCALE, random_indices, random_queries, random_rows, same_bits
from tests.helpers import assert_close

OUT_TOLERANCE = {"abs_tol": 8e-4, "rel_tol": 2.01 / 128, "cos_tol": 5e-6}
LSE_TOLERANCE = {"abs_tol": 2e-6, "rel_tol": 2e-6}

ROWS = random_rows(0, 6, 8)
Q = random_queries(1, 4, 2, 4)
INDICES = random_indices(2, 4, 2, 30, slots=48)
LONG_INDICES = random_indices(3, 4, 2, 2100, slots=48)
TABLE = jnp.array([[0, 1, 2], [3, 4, 5], [5, 0, -1], [2, 2, 9]], jnp.int32)
SEQ_LENS = jnp.array([20, 24, 0, 7], jnp.int32)
SINK = jnp.array([0.1, -0.2, jnp.inf, 0.3], jnp.float32)


def decode(q, rows, indices, sink=SINK):
    return sparse_decode(q, rows, indices, sm_scale=SCALE, attn_sink=sink)


def prefill(q, rows, indices, sink=SINK):
    return sparse_prefill(q, rows, indices, sm_scale=SCALE, attn_sink=sink)


def dense(q, rows, table, seq_lens):
    return dense_decode(q, rows, table, seq_lens, sm_scale=SCALE)


CALLS = [
    (decode, (Q, ROWS, INDICES)),
    (decode, (Q, ROWS, LONG_INDICES)),
    (prefill, (Q[:, 0], ROWS, INDICES[:, 0])),
    (dense, (Q, ROWS, TABLE, SEQ_LENS)),
    (merge, (jnp.stack([Q, Q]), jnp.stack([Q[..., 0], Q[..., 1]]).astype(jnp.float32))),
]


def assert_same(ours, wanted) -> None:
    assert_close(ours[0], wanted[0], **OUT_TOLERANCE)
    for a, b in zip(ours[1:], wanted[1:], strict=True):
        assert_close(a, b, **LSE_TOLERANCE)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_8_jit_without_a_word_with_the_host(op, args):
    compiled = jax.jit(op).lower(*args).compile()
    assert "callback" not in str(compiled.as_text())
    with jax.transfer_guard("disallow"):
        ours = compiled(*args)
    assert_same(ours, op(*args))


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_8_vmap_over_every_array(op, args):
    double = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x[::-1]]))
    batched = tuple(double(arg) for arg in args)
    ours = jax.vmap(op)(*batched)
    for i in range(2):
        wanted = op(*jax.tree.map(lambda x, i=i: x[i], batched))
        assert_same(jax.tree.map(lambda x, i=i: x[i], ours), wanted)


def test_8_vmap_with_one_cache():
    q, indices = jnp.stack([Q, Q[::-1]]), jnp.stack([INDICES, INDICES[::-1]])
    ours = jax.vmap(decode, in_axes=(0, None, 0))(q, ROWS, indices)
    for i in range(2):
        assert_same(jax.tree.map(lambda x, i=i: x[i], ours), decode(q[i], ROWS, indices[i]))


def test_8_donated_cache():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(rows, latents, slots):
        written = rows.set(slots, BF16Rows(latents, rank=rows.rank, rope_dim=rows.rope_dim))
        return written, decode(Q, written, INDICES)

    latents, slots = random_rows(5, 3).latents, jnp.array([3, -1, 40], jnp.int32)
    written = ROWS.set(slots, BF16Rows(latents, rank=128, rope_dim=64))
    wanted = decode(Q, written, INDICES)
    given = jax.tree.map(jnp.copy, ROWS)
    kept, ours = step(given, latents, slots)
    assert given.latents.is_deleted()
    same_bits(kept, written)
    assert_same(ours, wanted)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_8_export(op, args):
    leaves, tree = jax.tree.flatten(args)

    def on_leaves(*leaves):
        return op(*jax.tree.unflatten(tree, leaves))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    exported = jax.export.export(jax.jit(on_leaves), platforms=("cpu", "cuda"))(*shapes)
    assert_same(exported.call(*leaves), op(*args))


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    if jax.device_count("cpu") < 2:
        pytest.skip("needs two CPU devices")
    return jax.make_mesh(
        (2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2]
    )


@pytest.mark.parametrize("indices", [INDICES, LONG_INDICES], ids=["one step", "many steps"])
def test_8_shard_map_over_heads(mesh, indices):
    sharded = jax.shard_map(
        decode,
        mesh=mesh,
        in_specs=(P(None, None, "x"), P(), P(), P("x")),
        out_specs=(P(None, None, "x"), P(None, None, "x")),
    )
    assert_same(jax.jit(sharded)(Q, ROWS, indices, SINK), decode(Q, ROWS, indices))


def test_8_shard_map_over_the_batch(mesh):
    ops = (
        (decode, (Q, ROWS, LONG_INDICES), (P("x"), P(), P("x"))),
        (prefill, (Q[:, 0], ROWS, INDICES[:, 0]), (P("x"), P(), P("x"))),
        (dense, (Q, ROWS, TABLE, SEQ_LENS), (P("x"), P(), P("x"), P("x"))),
    )
    for op, args, specs in ops:
        wanted = op(*args)
        sharded = jax.shard_map(
            op, mesh=mesh, in_specs=specs, out_specs=tuple(P("x") for _ in wanted)
        )
        assert_same(jax.jit(sharded)(*args), wanted)


def test_8_shard_map_over_the_cache(mesh):
    """Context parallel: each device attends to its own slots, then the results are merged."""

    def local(q, rows, indices):
        first = jax.lax.axis_index("x") * rows.num_slots
        # A slot of another device is out of range here, so it is masked.
        out, lse = decode(q, rows, indices - first, sink=None)
        return merge(*(jax.lax.all_gather(x, "x") for x in (out, lse)))

    indices = jnp.where((LONG_INDICES < 0) | (LONG_INDICES >= 48), 48, LONG_INDICES)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("x"), P()), out_specs=P(), check_vma=False
    )
    ours = jax.jit(sharded)(Q, ROWS, indices)
    wanted = decode(Q, ROWS, indices, sink=None)
    assert_close(ours[0], wanted[0], abs_tol=2e-3, rel_tol=2.01 / 128, cos_tol=2e-5)
    assert_close(ours[1], wanted[1], **LSE_TOLERANCE)
    assert np.isfinite(np.asarray(ours[1])).any()


def test_8_varying_types_of_the_cache_alone(mesh):
    """With the check of varying axes on: the loop's carry must vary as its inputs do."""
    sharded = jax.shard_map(
        lambda q, rows, indices: decode(q, rows, indices, sink=None),
        mesh=mesh,
        in_specs=(P(), P("x"), P()),
        out_specs=(P("x"), P("x")),
    )
    out, lse = jax.jit(sharded)(Q, ROWS, LONG_INDICES)
    assert (out.shape, lse.shape) == ((8, 2, 4, 128), (8, 2, 4))
