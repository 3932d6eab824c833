"""Logits of the lightning indexer on Hopper: FP8 keys against FP8 queries of up to 64 heads.

Blocks that share the keys of all requests evenly take them in tiles, copied ahead by one warpgroup
and multiplied by the others. The weighted sum over heads is taken from the registers that the
tensor cores fill: products are never written.
"""

from pallas_kernels.indexer_logits.call import indexer_logits
from pallas_kernels.indexer_logits.shape import MOST_UNITS, Keys, Shape

__all__ = ["MOST_UNITS", "Keys", "Shape", "indexer_logits"]
