"""Index logits through the Hopper kernel of `pallas_kernels`: which calls it serves, and the call.

`pallas_kernels` is imported by the call and not by this module: importing Pallas takes as long as
importing the rest of jmla.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Int

from jmla.layouts.bf16_index_keys import BF16IndexKeyRows
from jmla.layouts.index_keys import IndexKeyRows
from jmla.layouts.paged_index_keys import PagedIndexKeyRows

if TYPE_CHECKING:
    from pallas_kernels.indexer_logits import Shape

MOST_HEADS = 64
DIMS = (64, 128)
_UNIT = 16  # bytes of which the distance between pages is a multiple
_MOST_BYTES = _UNIT * ((1 << 31) - 1)

Keys = IndexKeyRows | PagedIndexKeyRows | BF16IndexKeyRows


class Queries(NamedTuple):
    """What is scored, and for whom.

    Attributes:
        q: e4m3 or bf16 [requests, queries, heads, dim].
        weights: f32 [requests, queries, heads].
        starts: int32 [requests, queries], first position of each window; None: 0.
        ends: int32 [requests, queries], one past the last.
        page_table: int32 [requests, max_pages]; None for one request whose positions are the keys.
    """

    q: Float8e4m3fn[Array, "requests queries heads dim"] | BFloat16[Array, "b s_q heads dim"]
    weights: Float[Array, "requests queries heads"]
    starts: Int[Array, "requests queries"] | None
    ends: Int[Array, "requests queries"]
    page_table: Int[Array, "requests pages"] | None


class Forced(NamedTuple):
    """Tokens at both ends of a window whose logits are +inf: how many."""

    first: int
    last: int


NONE_FORCED = Forced(0, 0)


def unsupported_reasons(q: Array, keys: Keys) -> list[str]:
    """Why the kernel cannot score those keys for those queries; empty if it can."""
    reasons = []
    bf16 = isinstance(keys, BF16IndexKeyRows)
    multiplied = jnp.bfloat16 if bf16 else jnp.float8_e4m3fn
    if q.dtype != multiplied:
        reasons.append(
            f"{q.dtype=}: the mosaic_gpu kernel multiplies e4m3 (quantize_index_query) by e4m3, or "
            "bf16 by BF16IndexKeyRows"
        )
    if not 1 <= q.shape[-2] <= MOST_HEADS:
        reasons.append(f"{q.shape=}: the mosaic_gpu kernel takes 1 to {MOST_HEADS} heads")
    if q.shape[-1] not in DIMS:
        reasons.append(f"{q.shape=}: the mosaic_gpu kernel takes keys of {DIMS} values")
    if 0 in q.shape or keys.num_slots == 0:
        reasons.append(
            f"{q.shape=} {keys.shape=}: the mosaic_gpu kernel expects at least one query and key"
        )
    if isinstance(keys, PagedIndexKeyRows) and keys.page_size is not None:
        stride = keys.packed.shape[-1]
        if stride % _UNIT:
            reasons.append(
                f"{keys.packed.shape=}: the mosaic_gpu kernel expects pages at multiples of "
                f"{_UNIT} bytes"
            )
    num_bytes = keys.num_slots * q.shape[-1] * (2 if bf16 else 1)
    if max(num_bytes, _packed_bytes(keys)) > _MOST_BYTES:
        reasons.append(f"{keys.shape=}: the mosaic_gpu kernel takes at most {_MOST_BYTES} bytes")
    return reasons


def logits(
    queries: Queries, keys: Keys, forced: Forced = NONE_FORCED
) -> Float[Array, "requests queries positions"]:
    """Logits of arguments that `unsupported_reasons` has nothing against, -inf outside of windows.

    Without a page table there is one request, and the keys, of token shape [s], are its positions.
    With one, keys of token shape [pages, page_size] are at the positions that it says. vmap runs
    the kernel once for each entry.
    """
    return _compiled(queries, keys, forced)


def _mapped(queries: Queries, keys: Keys, forced: Forced) -> Array:
    launch = functools.partial(_launch, forced)
    return jax.custom_batching.sequential_vmap(launch)(queries, keys)


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_mapped, static_argnums=2)


def _launch(forced: Forced, queries: Queries, keys: Keys) -> Array:
    from pallas_kernels import indexer_logits as kernels

    shape, operands = arguments(queries, keys, forced)
    out = kernels.indexer_logits(shape, operands)
    return out.reshape(shape.requests, shape.queries, shape.columns)


def arguments(
    queries: Queries, keys: Keys, forced: Forced = NONE_FORCED
) -> tuple["Shape", dict[str, Array]]:
    """The kernel's: what it computes, and the arrays by their names."""
    from pallas_kernels import indexer_logits as kernels

    if isinstance(keys, PagedIndexKeyRows) and keys.page_size is None:
        keys = keys.unpacked()  # tokens that stand alone do not begin where the kernel can copy
    requests, count, heads, dim = queries.q.shape
    page_size = keys.shape[-1]
    pages = keys.num_slots // page_size
    operands = {
        "q": queries.q.reshape(-1, heads, dim),
        "weights": queries.weights.reshape(-1, heads),
        "ends": queries.ends.reshape(-1),
    }
    if isinstance(keys, PagedIndexKeyRows):
        operands["keys"] = keys.flat().packed
        where = kernels.Keys(pages, page_size, keys.packed.shape[-1], packed=True)
    elif isinstance(keys, BF16IndexKeyRows):
        operands["keys"] = keys.flat().keys
        where = kernels.Keys(pages, page_size, 2 * page_size * dim, packed=False)
    else:
        operands["keys"], operands["scales"] = keys.flat().keys, keys.flat().scales
        where = kernels.Keys(pages, page_size, page_size * dim, packed=False)
    columns, max_pages = page_size, None
    if queries.page_table is not None:
        max_pages = queries.page_table.shape[1]
        columns = max_pages * page_size
        operands["page_table"] = queries.page_table
    if queries.starts is not None:
        operands["starts"] = queries.starts.reshape(-1)
    shape = kernels.Shape(
        requests=requests,
        queries=count,
        heads=heads,
        dim=dim,
        columns=columns,
        keys=where,
        max_pages=max_pages,
        has_starts=queries.starts is not None,
        first=forced.first,
        last=forced.last,
        bf16=isinstance(keys, BF16IndexKeyRows),
    )
    return shape, operands


def _packed_bytes(keys: Keys) -> int:
    return keys.packed.size if isinstance(keys, PagedIndexKeyRows) else 0
