"""Sparse MLA decode on Hopper: attention of each query to rows of a cache chosen one by one.

A block of the grid serves one query, up to 64 of its heads and one part of its keys, with four
warpgroups: one brings the named rows into shared memory, one computes logits and softmax, two
compute 256 columns of the output each. There are two kinds: `narrow` blocks for few heads, `wide`
ones for 64.
"""

from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.row_formats import ROPE_DIM
from pallas_kernels.sparse_decode.call import KeyList, Results, sparse_decode

__all__ = ["FORMATS", "ROPE_DIM", "KeyList", "Results", "sparse_decode"]
