"""Sparse MLA decode on Hopper: attention of each query to rows of a cache chosen one by one.

A block of the grid serves one query, up to 64 of its heads and one part of its keys, with four
warpgroups:

- `gather` copies the named rows into a ring in shared memory, as they are stored;
- `scores` turns them into operands of the tensor cores, multiplies them with the query, and takes
  the softmax;
- two times `values` turn the same rows into operands of the second product, for 256 columns each.

Keys are the rows of a product (S^T = K Q^T, O^T = V^T P^T), so that few heads cost little, and
rows are converted in registers, so that converted keys are never stored.
"""

from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.row_formats import ROPE_DIM
from pallas_kernels.sparse_decode.call import KeyList, sparse_decode

__all__ = ["FORMATS", "ROPE_DIM", "KeyList", "sparse_decode"]
