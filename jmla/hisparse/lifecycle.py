"""How requests come, grow and go: admission after a prefill, new tokens of a step, release."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmla._checks import check_int32
from jmla._mosaic_cache import store, takes_kernel, unsupported_reasons
from jmla.cache import Cache
from jmla.hisparse._mosaic import HiSparseImplementation, copy_reasons, copy_rows
from jmla.hisparse._mosaic import place_new as place_by_kernel
from jmla.hisparse.host_memory import copy_by_xla
from jmla.hisparse.placement import forget, place_new, place_prompt
from jmla.hisparse.state import HiSparseState
from jmla.layouts.base import check_latents
from jmla.topk import paged_indices


def append(
    state: HiSparseState,
    seq_lens: Int[Array, " requests"],
    latents: Float[Array, "requests s_q width"],
    index_keys: Float[Array, "requests s_q dim"] | None = None,
    *,
    implementation: HiSparseImplementation | None = None,
) -> HiSparseState:
    """The state with each request's `s_q` new tokens stored, on the host and in its buffer.

    The tokens are those at positions `seq_lens - s_q` to `seq_lens - 1`. A request that fits into
    its buffer takes the slot of the position, a longer one the reserved slots, so that the newest
    tokens are always resident. What the buffer held of these positions or later ones, drafts that
    were rejected, is forgotten.

    Args:
        state: before the step, with the pages that the step needs assigned.
        seq_lens: int32 `[requests]`, the new tokens included; 0 for an idle row, whose tokens are
            dropped and whose buffer stays as it is. So is a token without a host page dropped.
        latents: bf16 or f32 `[requests, s_q, width]`; `s_q` at most `sizes.newest`.
        index_keys: bf16 or f32 `[requests, s_q, dim]`; required if the state has index keys.
        implementation: "mosaic_gpu", kernels that write the host's rows where they are; "xla"; or
            None for the kernels where they serve the call. Both store the same bytes, but for the
            sign and payload of NaN.

    Raises:
        ValueError: a wrong shape or dtype, more tokens than reserved slots, or index keys given or
            left out against the state.
        NotImplementedError: the kernel is asked for and cannot serve the call.
    """
    sizes = state.sizes
    check_int32("seq_lens", seq_lens, (sizes.requests,))
    if latents.ndim != 3 or latents.shape[0] != sizes.requests:
        raise ValueError(
            f"{latents.shape=}: expected [{sizes.requests}, s_q, {state.buffer_rows.width}], the "
            "new tokens of each request"
        )
    s_q = latents.shape[1]
    if not 1 <= s_q <= sizes.newest:
        raise ValueError(
            f"{latents.shape=}: {s_q} new tokens of a request, expected 1 to {sizes.newest=}, its "
            "reserved slots; make the state with HiSparseSizes(newest=...) of the draft tokens"
        )
    keys = state.index_keys
    if (keys is None) != (index_keys is None):
        raise ValueError(
            f"index_keys is {'None' if index_keys is None else 'an array'}: the state has "
            f"{'no index keys' if keys is None else f'index keys of {keys.dim} values'}; see "
            "index_dim of init_state"
        )
    check_latents(latents, state.buffer_rows.width)
    if keys is not None and index_keys is not None:
        if index_keys.shape[:-1] != (sizes.requests, s_q):
            raise ValueError(
                f"{index_keys.shape=}: expected [{sizes.requests}, {s_q}, {keys.dim}], a key for "
                "each new token"
            )
        check_latents(index_keys, keys.dim)
    new = (latents,) if index_keys is None else (latents, index_keys)
    sources = tuple(tokens.reshape(-1, tokens.shape[-1]) for tokens in new)
    tokens = (state.host_rows, state.buffer_rows, *(() if keys is None else (keys,)), *sources)
    kernel = takes_kernel(implementation, lambda: unsupported_reasons(*tokens, host=True))
    place = place_by_kernel if kernel else place_new
    residency, *slots = place(state.residency, seq_lens, s_q)
    host, buffer = (each.reshape(-1) for each in slots)
    # Apart: XLA takes all results of a call for host memory if one of them is there in place.
    (host_rows,) = store((state.host_rows,), host, sources[:1], kernel=kernel)
    (buffer_rows,) = store((state.buffer_rows,), buffer, sources[:1], kernel=kernel)
    if keys is not None:
        (keys,) = store((keys,), host, sources[1:], kernel=kernel)
    return HiSparseState(host_rows, buffer_rows, residency, keys)


def admit(
    state: HiSparseState,
    request: Int[Array, ""],
    length: Int[Array, ""],
    cache: Cache,
    cache_pages: Int[Array, " pages"],
    *,
    implementation: HiSparseImplementation | None = None,
) -> HiSparseState:
    """The state with a prefilled request in a row of the batch.

    All its rows and index keys are copied, the first `device_buffer_size` rows to the device
    buffer, too; a token without a page of the cache is left out. Nothing of the cache is changed;
    its pages are free once this has run. It moves `pages` whole pages whatever the length, so that
    one compilation serves all prompts.

    Args:
        state: with pages for `length` tokens assigned to the request.
        request: int32 scalar, the row; what was in its buffer is forgotten.
        length: int32 scalar, tokens of the prompt; at most `pages * page_size`.
        cache: what the prefill wrote, in the state's layout.
        cache_pages: int32 `[pages]`, the request's row of the prefill's page table.
        implementation: as in `append`; both store the same bytes.

    Raises:
        ValueError: wrong shapes or dtypes, or a cache of another format.
        NotImplementedError: the kernel is asked for and cannot serve the call.
    """
    check_int32("request", request, ())
    check_int32("length", length, ())
    if cache_pages.ndim != 1 or cache_pages.dtype != jnp.int32:
        raise ValueError(
            f"{cache_pages.shape=} {cache_pages.dtype=}: expected int32 [pages], one request's row "
            "of a page table"
        )
    _check_formats(state, cache)
    position = jnp.arange(cache_pages.shape[0] * cache.page_size, dtype=jnp.int32)
    stored = jnp.where(position < length, position, -1)[None, :]
    source = paged_indices(stored, cache_pages[None, :], page_size=cache.page_size)[0]
    residency = place_prompt(state.residency, request, length)
    host = residency.host_slots(stored, request[None])[0]
    in_buffer = jnp.where(stored < state.sizes.device_buffer_size, stored, -1)
    buffer = residency.buffer_rows_of(in_buffer, request[None])[0]
    tokens = cache.rows, state.host_rows, state.buffer_rows
    kernel = takes_kernel(implementation, lambda: copy_reasons(*tokens))
    copy = copy_rows if kernel else copy_by_xla
    keys: Any = state.index_keys
    if keys is not None:
        keys = copy(cache.index_keys, keys, source, host)
    return HiSparseState(
        copy(cache.rows, state.host_rows, source, host),
        copy(cache.rows, state.buffer_rows, source, buffer),
        residency,
        keys,
    )


def release(state: HiSparseState, request: Int[Array, ""]) -> HiSparseState:
    """The state without a request: its row owns no pages, and every position of it gives -1.

    Slots that `swap_in` gave for it before are no longer its own; other requests may fill them.

    Args:
        state: before.
        request: int32 scalar, the row.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    check_int32("request", request, ())
    return dataclasses.replace(state, residency=forget(state.residency, request))


def _check_formats(state: HiSparseState, cache: Cache) -> None:
    for name in ("rows", "index_keys"):
        ours = state.buffer_rows if name == "rows" else state.index_keys
        theirs = getattr(cache, name)
        our_form: object = jax.tree.structure(ours)
        their_form: object = jax.tree.structure(theirs)
        if our_form != their_form:
            raise ValueError(
                f"cache.{name} are {their_form}: expected the format of the state, {our_form}; "
                "make both with the same plan"
            )
