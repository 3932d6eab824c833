"""Dense attention of a batch of prompts, by the op for dense decode.

That op takes the last `s_q` tokens of each of its requests, all with the same `s_q`. So the batch's
tokens are cut into tiles of equal size, none of them across two requests, and each tile is handed
over as a request of its own that ends where the tile does. The first tokens of a request's last
tile may be in the tile before, too; they are computed twice and used once.
"""

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from jmla.attention import Implementation, dense_decode
from jmla.batch import BatchMeta
from jmla.layouts.base import Rows

_TILE = 64


def dense_prefill(
    q: BFloat16[Array, "t h width"],
    rows: Rows,
    batch: BatchMeta,
    *,
    sm_scale: float,
    implementation: Implementation | None,
) -> tuple[BFloat16[Array, "t h value"], Float[Array, "t h"]]:
    """Each token's attention to all of its request up to itself.

    Args:
        q: bf16 [t, h, width], the batch's new tokens in its order.
        rows: the cache, of token shape (pages, page_size), with these tokens already in it.
        batch: describes the `t` tokens.
        sm_scale: factor on the logits.
        implementation: as of `dense_decode`.

    Returns:
        out, bf16 [t, h, value_dim], and lse, f32 [t, h]; 0 and -inf for padding.
    """
    num_tokens, num_heads = q.shape[:2]
    tile = min(_TILE, max(num_tokens, 1))
    num_requests = batch.seq_lens.shape[0]
    num_tiles = num_tokens // tile + num_requests  # each request has at most one that is not full
    if num_tiles == 0 or num_tokens == 0:
        empty = jnp.zeros((num_tokens, num_heads, rows.value_dim), q.dtype)
        return empty, jnp.full((num_tokens, num_heads), -jnp.inf, jnp.float32)

    first_tile = jnp.pad(jnp.cumsum(-(-batch.new_lens // tile)), (1, 0))
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    # A tile past the last request's names the request `num_requests`, which reads as zeros.
    request = jnp.searchsorted(first_tile[1:], index, side="right").astype(jnp.int32)
    new_len = _take(batch.new_lens, request)
    end = jnp.minimum((index - _take(first_tile, request) + 1) * tile, new_len)
    seq_lens = jnp.maximum(_take(batch.seq_lens, request) - new_len + end, 0)
    token = (_take(batch.cu_seqlens_q, request) + end - tile)[:, None]
    token += jnp.arange(tile, dtype=jnp.int32)[None, :]

    out, lse = dense_decode(
        _take(q, token),
        rows,
        _take(batch.page_table, request),
        jnp.where(request < num_requests, seq_lens, 0),
        sm_scale=sm_scale,
        implementation=implementation,
    )

    owner = batch.token_request
    place = jnp.arange(num_tokens, dtype=jnp.int32) - _take(batch.cu_seqlens_q, owner)
    its_tile = place // tile
    its_end = jnp.minimum((its_tile + 1) * tile, _take(batch.new_lens, owner))
    row = (_take(first_tile, owner) + its_tile + 1) * tile + place - its_end
    row = jnp.where(owner < 0, -1, row)
    out = _take(out.reshape(num_tiles * tile, num_heads, rows.value_dim), row)
    return out, _take(lse.reshape(num_tiles * tile, num_heads), row, fill=-jnp.inf)


def _take(values: Array, index: Array, fill: float = 0) -> Array:
    return values.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False)
