"""What positions mean to a cache: slots of its pages, or rows of a buffer of all requests."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32

from jmla._checks import check_int32


def paged_indices(
    positions: Int[Array, "rows k"],
    page_table: Int[Array, "requests pages"],
    *,
    page_size: int,
    requests: Int[Array, " rows"] | None = None,
) -> Int32[Array, "rows k"]:
    """The cache slots of positions: the position's page times the page size, plus the rest.

    Every position that names no slot gives -1: negative ones, positions past the table's last
    page, pages that are negative or too large for an int32 slot, and all positions of a row whose
    request does not exist. Whether a page is in the cache is for the reader of the slot to check.

    Args:
        positions: int32 `[rows, k]`, each inside its request.
        page_table: int32 `[requests, max_pages]`; entries past a request's end may hold anything.
        page_size: tokens per page.
        requests: int32 `[rows]`, the row of the page table that each row of positions uses; None:
            row `i` uses row `i`, and both must have the same number of rows.

    Returns:
        int32 `[rows, k]` slots.

    Raises:
        ValueError: wrong shapes or dtypes, or `page_size < 1`.
    """
    if positions.ndim != 2:
        raise ValueError(f"{positions.shape=}: expected [rows, k]")
    check_int32("positions", positions, positions.shape)
    check_pages(positions.shape[0], page_table, page_size, requests)
    if requests is None:
        requests = lax.iota(jnp.int32, positions.shape[0])
    if 0 in page_table.shape:
        return jnp.full_like(positions, -1)
    page_of = jnp.floor_divide(positions, page_size)
    page = page_table.at[requests[:, None], page_of].get(
        mode="fill", fill_value=-1, wrap_negative_indices=False
    )
    last_page = jnp.iinfo(jnp.int32).max // page_size - 1
    slot = jnp.clip(page, 0, last_page) * page_size + (positions - page_of * page_size)
    return jnp.where((page >= 0) & (page <= last_page), slot, -1)


def ragged_indices(
    positions: Int[Array, "rows k"], offsets: Int[Array, " rows"]
) -> Int32[Array, "rows k"]:
    """Positions as rows of the contiguous buffer in which row `i`'s request begins at `offsets[i]`.

    Args:
        positions: int32 `[rows, k]`; negative ones mean "no token".
        offsets: int32 `[rows]`, e.g. `BatchMeta.ragged_offsets`.

    Returns:
        int32 `[rows, k]`: `positions + offset`, -1 where the position is negative.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    if positions.ndim != 2:
        raise ValueError(f"{positions.shape=}: expected [rows, k]")
    check_int32("positions", positions, positions.shape)
    check_int32("offsets", offsets, positions.shape[:1])
    return jnp.where(positions < 0, -1, positions + offsets[:, None])


def check_pages(rows: int, page_table: Array, page_size: int, requests: Array | None) -> None:
    """Raises ValueError unless these give `rows` rows of positions their pages."""
    if page_table.ndim != 2:
        raise ValueError(f"{page_table.shape=}: expected [requests, max_pages]")
    check_int32("page_table", page_table, page_table.shape)
    if page_size < 1:
        raise ValueError(f"{page_size=}: expected at least 1")
    if requests is not None:
        check_int32("requests", requests, (rows,))
    elif page_table.shape[0] != rows:
        raise ValueError(
            f"{page_table.shape=}, {rows=}: without requests= both need the same number of rows; "
            "pass requests, the page-table row of each row"
        )
