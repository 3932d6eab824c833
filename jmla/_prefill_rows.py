"""What a prefill reads instead of the stored rows: copies made once for the whole batch.

Both copies are bounded by the page table, `b * max_pages * page_size` rows, which jit needs to know
beforehand: give the page table as many columns as the longest request needs, no more.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jmla.batch import BatchMeta
from jmla.layouts import convert
from jmla.layouts.base import KVLayout, Rows
from jmla.layouts.bf16 import BF16Rows


def gathered_rows(rows: Rows, batch: BatchMeta) -> BF16Rows:
    """All tokens of all requests as bf16 rows, back to back: the buffer of RAGGED indices.

    Takes `b * max_pages * page_size` rows of `2 * width` bytes.
    """
    total = batch.page_table.size * batch.page_size
    latents = rows.gather(batch.ragged_slots(total)).dequantize()
    # The value of an FP8_V4 row is the whole row: `rank` is what says so in bf16.
    rope_dim = rows.width - rows.value_dim
    return BF16Rows(latents, rank=rows.value_dim, rope_dim=rope_dim)


def converted_pages(rows: Rows, batch: BatchMeta) -> tuple[Rows, Int32[Array, "b pages"]]:
    """The pages that the batch's requests use as block-scale rows, and a page table into them.

    Every other page of the cache is left alone. Takes `b * max_pages` pages.
    """
    table, page_size = batch.page_table, batch.page_size
    first = jnp.arange(table.shape[1], dtype=jnp.int32) * page_size
    used = (first[None, :] < batch.seq_lens[:, None]) & (table >= 0)
    used &= table < rows.num_slots // page_size
    in_page = jnp.arange(page_size, dtype=jnp.int32)
    slots = (table * page_size)[..., None] + in_page[None, None, :]
    slots = jnp.where(used[..., None], slots, -1)  # a garbage entry may have wrapped round
    # "fp32" holds the scale of any FP8 tensor; the copy does not outlive the call.
    converted = convert(
        rows,
        KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE,
        slots=slots.reshape(table.size, page_size),
        scale_format="fp32",
    )
    pages = jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape)
    return converted, jnp.where(used, pages, -1)
