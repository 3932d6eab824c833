"""Dense MLA decode on Hopper: attention of each request's last tokens to all of its positions.

The blocks are those of `sparse_decode`: only where keys come from differs. All heads of all tokens
of a request are the heads of one query, because they read the same keys, and a block takes a part
of them and of the request's positions.
"""

from pallas_kernels.dense_decode.call import Pages, dense_decode

__all__ = ["Pages", "dense_decode"]
