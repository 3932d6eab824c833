"""The k largest scores of each row on Hopper, exactly, as positions in ascending order.

One or more blocks of the grid take a row. Many short rows are searched in registers; of longer ones
a sample says which scores may matter, one pass keeps those in shared memory, and they are searched.
The result is exact whatever the sample said.
"""

from pallas_kernels.select_topk.call import select_topk
from pallas_kernels.select_topk.shape import LARGEST_K, MOST_COLUMNS, PagedSlots, RaggedRows

__all__ = ["LARGEST_K", "MOST_COLUMNS", "PagedSlots", "RaggedRows", "select_topk"]
