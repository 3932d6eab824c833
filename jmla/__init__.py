"""Sparse multi-head latent attention for JAX: layouts, cache, selection, ops and dispatch."""

from jmla.attention import dense_decode, merge, sparse_decode, sparse_prefill
from jmla.batch import BatchMeta, make_batch
from jmla.cache import Cache, append, init_cache
from jmla.config import Config, GQAConfig, HiSparseConfig
from jmla.dispatch.fp4 import FP4CompatibilityError
from jmla.dispatch.resolve import alternatives, resolve, valid_pairs
from jmla.gqa import gqa_decode
from jmla.gqa_plan import GQAPlan
from jmla.index_query import (
    RawIndexQueries,
    hadamard_rotation,
    prepare_index_query,
    quantize_index_query,
)
from jmla.indexer import (
    force_tokens,
    indexer_logits,
    paged_indexer_logits,
)
from jmla.indexer_topk import expand_pools, paged_indexer_topk, pool_index_keys
from jmla.layouts import (
    IndexKeyRows,
    KeyValueRows,
    KVLayout,
    Rows,
    convert,
    dequantize,
    from_bytes,
    quantize,
    quantize_index_keys,
    quantize_key_values,
    to_bytes,
    zero_key_values,
)
from jmla.pages import move_pages
from jmla.plan import Plan
from jmla.raw_latents import RawLatents
from jmla.topk import (
    identity_topk,
    paged_indices,
    ragged_indices,
    select_paged_indices,
    select_ragged_indices,
    select_topk,
)

__version__ = "0.1.0"

__all__ = [
    "BatchMeta",
    "Cache",
    "Config",
    "FP4CompatibilityError",
    "GQAConfig",
    "GQAPlan",
    "HiSparseConfig",
    "IndexKeyRows",
    "KVLayout",
    "KeyValueRows",
    "Plan",
    "RawIndexQueries",
    "RawLatents",
    "Rows",
    "alternatives",
    "append",
    "convert",
    "dense_decode",
    "dequantize",
    "expand_pools",
    "force_tokens",
    "from_bytes",
    "gqa_decode",
    "hadamard_rotation",
    "identity_topk",
    "indexer_logits",
    "init_cache",
    "make_batch",
    "merge",
    "move_pages",
    "paged_indexer_logits",
    "paged_indexer_topk",
    "paged_indices",
    "pool_index_keys",
    "prepare_index_query",
    "quantize",
    "quantize_index_keys",
    "quantize_index_query",
    "quantize_key_values",
    "ragged_indices",
    "resolve",
    "select_paged_indices",
    "select_ragged_indices",
    "select_topk",
    "sparse_decode",
    "sparse_prefill",
    "to_bytes",
    "valid_pairs",
    "zero_key_values",
]
