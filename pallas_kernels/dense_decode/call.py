"""The launches of a call."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.dense_decode import boxes
from pallas_kernels.dense_decode.keys import DenseShape, PagedKeys
from pallas_kernels.dense_decode.tuning import choose, tuning_for
from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.join import join
from pallas_kernels.sparse_decode.call import launch_parts, program_for
from pallas_kernels.sparse_decode.tuning import WIDE_HEADS


class Pages(NamedTuple):
    """The contexts of `b` requests.

    Attributes:
        format: one of `FORMATS`.
        arrays: the cache, as the format names its arrays, with one axis of slots; or of pages, for
            formats whose array is one of pages [pages, bytes].
        table: int32 [b, max_pages]; a page outside the cache is masked.
        lengths: int32 [b], positions of each request.
        page_size: positions of a page.
    """

    format: str
    arrays: Mapping[str, Array]
    table: Int[Array, "b max_pages"]
    lengths: Int[Array, " b"]
    page_size: int

    @property
    def _rows(self) -> Array:
        return self.arrays[FORMATS[self.format].nope.array]

    @property
    def whole_pages(self) -> bool:
        """Whether the format's rows lie in pages of their own making."""
        return self.format == "paged_v4"

    @property
    def num_slots(self) -> int:
        """Rows of the cache."""
        return self._rows.shape[0] * (self.page_size if self.whole_pages else 1)

    @property
    def stored_pages(self) -> tuple[int, int] | None:
        """See `Shape.pages`."""
        return (self.page_size, self._rows.shape[1]) if self.whole_pages else None


def dense_decode(
    q: BFloat16[Array, "b s_q h width"],
    pages: Pages,
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool,
    window: int | None,
    num_splits: int | None,
) -> tuple[BFloat16[Array, "b s_q h 512"], Float[Array, "b s_q h"]]:
    """Attention of the last tokens of each request to its positions: out, and lse.

    Args:
        q: bf16 [b, s_q, h, width], of the cache's format; no axis is empty.
        pages: of the requests.
        sm_scale: factor on the logits.
        causal: whether a token attends to positions up to its own alone.
        window: of these positions a token attends to the last so many; None for all.
        num_splits: parts of each request; None chooses by the shapes.
    """
    if window is not None and causal and q.shape[1] > 1:
        return _by_token(q, pages, sm_scale, window, num_splits)
    requests, tokens, heads, width = q.shape
    row_format = FORMATS[pages.format]
    longest = pages.table.shape[1] * pages.page_size
    choice = choose(
        row_format,
        requests,
        tokens * heads,
        longest,
        pages.page_size,
        num_splits,
        masks=window is not None or (causal and tokens > 1 and heads % WIDE_HEADS > 0),
    )
    shape = DenseShape(
        n=requests,
        heads=tokens * heads,
        topk=longest,
        num_slots=pages.num_slots,
        splits=choice.splits,
        final=choice.splits == 1,
        has_lengths=True,
        has_sink=False,
        has_scale="scale" in pages.arrays,
        has_max_logits=False,
        pages=pages.stored_pages,
        tokens=tokens,
        causal=causal,
        window=window,
        page_size=pages.page_size,
    )
    operands = {
        "q": q.reshape(requests, tokens * heads, width),
        "page_table": pages.table,
        "seq_lens": pages.lengths,
        "sm_scale": jnp.asarray(sm_scale, jnp.float32).reshape(1),
        **pages.arrays,
    }
    if "scale" in operands:
        operands["scale"] = operands["scale"].reshape(1)
    if boxes.serves(row_format, pages.page_size):
        program = boxes.program(row_format, PagedKeys)
    else:
        # Blocks of a pair read the same keys: they are of one token.
        alike = tokens == 1 or not causal or heads % (2 * WIDE_HEADS) == 0
        of_query = tokens * heads if alike else WIDE_HEADS
        program = program_for(row_format, choice, of_query, PagedKeys, tuning_for)
    results = launch_parts(program, shape, operands)
    out, lse = results["out"], results["lse"]
    if not shape.final:
        out, lse = join(out, lse)
    return out.reshape(requests, tokens, heads, -1), lse.reshape(requests, tokens, heads)


def _by_token(
    q: BFloat16[Array, "b s_q h width"],
    pages: Pages,
    sm_scale: float | Float[Array, ""],
    window: int,
    num_splits: int | None,
) -> tuple[BFloat16[Array, "b s_q h 512"], Float[Array, "b s_q h"]]:
    """Each token as a request of its own, whose window begins elsewhere."""
    requests, tokens, heads, width = q.shape
    behind = jnp.arange(tokens - 1, -1, -1, dtype=jnp.int32)
    lengths = jnp.maximum(pages.lengths, 0)[:, None] - behind[None, :]
    out, lse = dense_decode(
        q.reshape(requests * tokens, 1, heads, width),
        pages._replace(table=jnp.repeat(pages.table, tokens, axis=0), lengths=lengths.reshape(-1)),
        sm_scale=sm_scale,
        causal=True,
        window=window,
        num_splits=num_splits,
    )
    return out.reshape(requests, tokens, heads, -1), lse.reshape(requests, tokens, heads)
