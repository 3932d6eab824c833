"""The k largest scores of each row on Hopper, exactly, as positions in ascending order.

One or more blocks of the grid take a row. Rows that fit in a block's registers are searched there;
of longer ones a sample says which scores may matter, one pass keeps those in shared memory, and the
search is among them. The result is exact whatever the sample said.
"""

from pallas_kernels.select_topk.call import select_topk
from pallas_kernels.select_topk.shape import LARGEST_K, MOST_COLUMNS, PagedSlots, RaggedRows

__all__ = ["LARGEST_K", "MOST_COLUMNS", "PagedSlots", "RaggedRows", "select_topk"]
