"""Moves of pages by the kernel of `pallas_kernels.page_copy`, or by XLA.

`pallas_kernels` is imported by the calls; see `jmla._mosaic_cache`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jmla._mosaic_cache import in_memory_of, over_axis
from jmla.hisparse.host_memory import read_rows, write_rows
from jmla.layouts._paged import PagedTokens
from jmla.layouts.base import TokenRows, page_slots

Tokens = tuple[TokenRows, ...]


def move(
    gaining: Tokens,
    held: Tokens | None,
    source_pages: Int[Array, " n"],
    target_pages: Int[Array, " n"],
    *,
    kernel: bool,
) -> tuple[Any, ...]:
    """Tokens with pages of others, of the same formats and page size.

    Args:
        gaining: where pages go, of token shape (pages, page_size); the same for all.
        held: where they come from; None is `gaining`, whose pages go by way of a buffer.
        source_pages: int32.
        target_pages: int32; a pair of which either page does not exist is dropped.
        kernel: whether kernels do it, in place; under vmap XLA does in any case.
    """
    origin = gaining if held is None else held
    if 0 in (source_pages.size, gaining[0].num_slots, origin[0].num_slots):
        return gaining
    return (_compiled if kernel else _by_xla)(gaining, held, source_pages, target_pages)


def _by_xla(gaining: Any, held: Any, source_pages: Any, target_pages: Any) -> Any:
    origin = gaining if held is None else held
    exists = (source_pages >= 0) & (source_pages < origin[0].shape[0])
    targets = jnp.where(exists, target_pages, -1)
    # All are read before any is written.
    taken = [read_rows(*_places(tokens, source_pages)) for tokens in origin]
    return tuple(
        _with_pages(tokens, write_rows(*_places(tokens, targets), new))
        for tokens, new in zip(gaining, taken, strict=True)
    )


def _places(tokens: Any, pages: Int[Array, " n"]) -> tuple[Any, Int[Array, " slots"]]:
    """The tokens, or pages in the place of tokens if those stay packed, and their slots."""
    if isinstance(tokens, PagedTokens):
        return dataclasses.replace(tokens, page_size=None), pages
    return tokens, page_slots(pages, *tokens.shape).reshape(-1)


def _with_pages(form: TokenRows, tokens: Any) -> TokenRows:
    if isinstance(form, PagedTokens):
        return dataclasses.replace(tokens, page_size=form.page_size)
    return tokens


@jax.custom_batching.custom_vmap
def _move(gaining: Any, held: Any, source_pages: Any, target_pages: Any) -> Any:
    from pallas_kernels.page_copy import copy_pages

    if held is None:
        taken = copy_pages(_leaves(gaining), None, source_pages, None)
        # A page that does not exist has left its place in the buffer as it was.
        exists = (source_pages >= 0) & (source_pages < gaining[0].shape[0])
        targets = jnp.where(exists, target_pages, -1)
        moved = copy_pages(taken, _leaves(gaining), None, targets)
    else:
        moved = copy_pages(_leaves(held), _leaves(gaining), source_pages, target_pages)
    leaves = iter(moved)
    return tuple(
        tokens.map_tokens(lambda leaf: in_memory_of(next(leaves), leaf)) for tokens in gaining
    )


def _leaves(tokens: Tokens) -> list[Array]:
    return [getattr(each, name) for each in tokens for name in each.token_leaves]


@_move.def_vmap
def _move_over_axis(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
    return over_axis(_by_xla, axis_size, in_batched, arguments)


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_move)
