"""Index queries in one launch: rotated by position and by a Hadamard matrix, quantised to e4m3."""

from pallas_kernels.index_query.call import index_query
from pallas_kernels.index_query.shape import Shape

__all__ = ["Shape", "index_query"]
