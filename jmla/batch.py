"""One batch of requests as arrays: which token is whose, how far it sees, where it is stored.

The same description serves decode (one new token each), extend with and without a prefix, mixed
batches and the verification of several draft tokens: they differ only in `new_lens`.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32

from jmla.topk import paged_indices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchMeta:
    """What the ops of one step need to know of its requests; build it with `make_batch`.

    The batch's `T` new tokens are ordered by request, then by position; what is left of `T` after
    the last request is padding. On the key axis all tokens of all requests, old and new, are laid
    back to back ("ragged" rows); a request's first token is there at `cu_seqlens_k[request]`.

    Attributes:
        seq_lens: int32 `[b]`, tokens of each request, the new ones included.
        new_lens: int32 `[b]`, how many of them are new, i.e. are queries of this step.
        page_table: int32 `[b, max_pages]`; entries past a request's end may hold anything.
        cu_seqlens_q: int32 `[b + 1]`, running sum of `new_lens`, from 0.
        cu_seqlens_k: int32 `[b + 1]`, running sum of `seq_lens`, from 0.
        token_request: int32 `[T]`, each token's request; -1 padding.
        token_position: int32 `[T]`, each token's position inside its request; -1 padding.
        ragged_offsets: int32 `[T]`, the ragged row of each token's request's first; 0 padding.
        write_slots: int32 `[T]`, the cache slot of each new token; -1 padding or no page.
        page_size: tokens per page, static.
    """

    seq_lens: Array
    new_lens: Array
    page_table: Array
    cu_seqlens_q: Array
    cu_seqlens_k: Array
    token_request: Array
    token_position: Array
    ragged_offsets: Array
    write_slots: Array
    page_size: int = field(metadata={"static": True})

    @property
    def lengths(self) -> Int32[Array, " T"]:
        """How many tokens of its request each token sees, itself included; 0 for padding."""
        return self.token_position + 1

    @property
    def window_starts(self) -> Int32[Array, " T"]:
        """First ragged row that each token sees; 0 for padding."""
        return self.ragged_offsets

    @property
    def window_ends(self) -> Int32[Array, " T"]:
        """One past the last ragged row that each token sees, its own; 0 for padding."""
        return self.ragged_offsets + self.lengths

    def topk_lengths(self, k: int) -> Int32[Array, " T"]:
        """How many entries of each token's `k` selected positions are real."""
        return jnp.minimum(self.lengths, k)

    def ragged_slots(self, total: int) -> Int32[Array, " total"]:
        """The cache slot of every ragged row: all tokens of all requests, back to back.

        Args:
            total: static number of rows; at least `cu_seqlens_k[-1]` to see all tokens.

        Returns:
            int32 `[total]`; -1 beyond the last request's last token, and where there is no page.
        """
        row = lax.iota(jnp.int32, total)
        request = _owner(row, self.cu_seqlens_k)
        position = row - _take(self.cu_seqlens_k, request)
        return _slots(position, request, self.page_table, self.page_size)


def make_batch(
    seq_lens: Int[Array, " b"],
    new_lens: Int[Array, " b"],
    page_table: Int[Array, "b pages"],
    *,
    num_tokens: int,
    page_size: int,
) -> BatchMeta:
    """Describes a batch in which request `i` gets `new_lens[i]` tokens and then has `seq_lens[i]`.

    Works under jit: the arrays may be tracers, `num_tokens` and `page_size` are static. Values
    cannot raise there, so each has a meaning: negative lengths count as 0; tokens beyond
    `num_tokens` are left out; where `new_lens[i] > seq_lens[i]` the request keeps its place among
    the tokens and its surplus leading tokens are padding, which is how an idle row of a decode
    batch of fixed shape is written (`seq_lens` 0, `new_lens` 1).

    Args:
        seq_lens: int32 `[b]`, lengths after this step.
        new_lens: int32 `[b]`: 1 in decode, the number of draft tokens in verification, else the
            number of prompt tokens of this step; 0 for a request that takes no part.
        page_table: int32 `[b, max_pages]`, the page of each `page_size` positions.
        num_tokens: `T`, the length of the token axis, at least the sum of `new_lens`.
        page_size: tokens per page.

    Returns:
        The batch.

    Raises:
        ValueError: wrong shapes or dtypes, negative `num_tokens`, or `page_size < 1`.
    """
    for name, lens in (("seq_lens", seq_lens), ("new_lens", new_lens)):
        if lens.ndim != 1 or lens.shape != seq_lens.shape or lens.dtype != jnp.int32:
            raise ValueError(
                f"{name}: got {lens.dtype}{list(lens.shape)}, expected int32 [b], the same b for "
                "seq_lens and new_lens"
            )
    if page_table.ndim != 2 or page_table.shape[0] != seq_lens.size:
        raise ValueError(
            f"{page_table.shape=}, {seq_lens.shape=}: expected a page table [b, max_pages]"
        )
    if num_tokens < 0:
        raise ValueError(f"{num_tokens=}: expected at least 0")

    seq_lens, new_lens = jnp.maximum(seq_lens, 0), jnp.maximum(new_lens, 0)
    cu_seqlens_q, cu_seqlens_k = _running_sum(new_lens), _running_sum(seq_lens)
    token = lax.iota(jnp.int32, num_tokens)
    request = _owner(token, cu_seqlens_q)
    position = token - _take(cu_seqlens_q, request) + _take(seq_lens - new_lens, request)
    is_token = (request >= 0) & (position >= 0)
    request, position = jnp.where(is_token, request, -1), jnp.where(is_token, position, -1)
    return BatchMeta(
        seq_lens=seq_lens,
        new_lens=new_lens,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        token_request=request,
        token_position=position,
        ragged_offsets=_take(cu_seqlens_k, request),
        write_slots=_slots(position, request, page_table, page_size),
        page_size=page_size,
    )


def _running_sum(lens: Array) -> Array:
    return jnp.pad(jnp.cumsum(lens), (1, 0))


def _owner(item: Array, cu_seqlens: Array) -> Array:
    """The request whose half-open range of `cu_seqlens` holds each item; -1 past the last one."""
    request = jnp.searchsorted(cu_seqlens[1:], item, side="right")
    return jnp.where(request < cu_seqlens.size - 1, request, -1)


def _take(values: Array, request: Array) -> Array:
    """Each item's value of its request, 0 for padding."""
    if values.size == 0:
        return jnp.zeros_like(request)
    return values.at[request].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _slots(position: Array, request: Array, page_table: Array, page_size: int) -> Array:
    slots = paged_indices(position[:, None], page_table, page_size=page_size, requests=request)
    return slots[:, 0]
