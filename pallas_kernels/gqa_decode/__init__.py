"""Grouped-query decode on Hopper: attention of each request's last tokens to all its positions.

A block has the query heads that share one head of the cache, of all tokens of a request, and a part
of the request's positions. Each of its four warps copies and reads keys of its own and runs a
softmax of its own, so that no warp waits for another before the end. Products are of single warps,
16 rows high: that is what so few heads fill, and the reading of keys takes longer.
"""

from pallas_kernels.gqa_decode.call import HeadPages, gqa_decode

__all__ = ["HeadPages", "gqa_decode"]
