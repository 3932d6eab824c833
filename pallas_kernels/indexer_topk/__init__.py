"""The slots or positions of the k largest index logits of each request, without the logits.

The blocks of the logits keep what may be among the k largest of the keys that they score, in shared
memory, and write that alone; a second launch joins what blocks have kept of each row.
"""

from pallas_kernels.indexer_topk.call import indexer_topk, pays

__all__ = ["indexer_topk", "pays"]
