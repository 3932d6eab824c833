"""What the Hopper kernels promise, in jnp: takes their place on any machine."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jmla.layouts import FP4Rows, KVLayout, V4Rows, from_bytes
from tests.attention.exact import POW2

Results = pytest.importorskip(
    "pallas_kernels.sparse_decode", reason="needs Pallas for GPUs"
).Results


def stand_in(q, lists, *, sm_scale, attn_sink, num_splits=None, with_max_logits=False) -> Any:
    """What `pallas_kernels.sparse_decode` promises, in f32."""
    keys, valid = [], []
    for each in lists:
        latents = _latents(each)
        assert latents.shape == (each.num_slots, q.shape[-1])
        named = (each.indices >= 0) & (each.indices < each.num_slots)
        if each.lengths is not None:
            assert each.lengths.shape == q.shape[:1]
            places = jnp.arange(each.indices.shape[1], dtype=jnp.int32)
            named &= places[None, :] < each.lengths[:, None]
        rows = latents.at[jnp.where(named, each.indices, 0)].get(mode="promise_in_bounds")
        keys.append(jnp.where(named[..., None], rows, 0.0))
        valid.append(named)
    key, named = jnp.concatenate(keys, axis=1), jnp.concatenate(valid, axis=1)
    logits = jnp.einsum("nhw,nkw->nhk", q.astype(jnp.float32), key, precision="highest")
    logits = jnp.where(named[:, None], logits * jnp.asarray(sm_scale, jnp.float32), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    shift = lse if attn_sink is None else jnp.logaddexp(lse, attn_sink[None, :])
    weights = jnp.where(jnp.isneginf(lse)[..., None], 0.0, jnp.exp(logits - shift[..., None]))
    out = jnp.einsum("nhk,nkw->nhw", weights, key[..., :512], precision="highest")
    top = jnp.max(logits, axis=-1) if with_max_logits else None
    return Results(out.astype(jnp.bfloat16), lse, top)


def _latents(each: Any) -> jax.Array:
    arrays = each.arrays
    if each.format in ("fp4", "v4", "paged_v4"):
        rows = {
            "fp4": lambda: FP4Rows(**arrays, rank=512, rope_dim=64),
            "v4": lambda: V4Rows(**arrays, rank=448, rope_dim=64),
            "paged_v4": lambda: from_bytes(
                arrays["packed"], KVLayout.FP8_V4, page_size=each.page_size
            ).flat(),
        }[each.format]()
        return rows.dequantize().astype(jnp.float32)
    if each.format.startswith("packed"):
        rows = from_bytes(arrays["packed"], POW2[0])
        arrays = {name: getattr(rows, name) for name in rows.token_leaves}
    arrays = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    if each.format == "bf16":
        return arrays["latents"]
    if each.format == "fp8":
        return arrays["values"] * arrays.get("scale", jnp.float32(1))
    nope = arrays["nope"].reshape(-1, 4, 128) * arrays["scales"][..., None]
    return jnp.concatenate([nope.reshape(-1, 512), arrays["rope"]], axis=-1)
