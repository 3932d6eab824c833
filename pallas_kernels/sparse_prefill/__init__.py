"""Sparse MLA prefill on Hopper: attention of many queries to BF16 rows chosen one by one."""

from pallas_kernels.sparse_prefill.call import sparse_prefill

__all__ = ["sparse_prefill"]
