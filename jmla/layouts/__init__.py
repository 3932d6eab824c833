"""KV-cache layouts: one file, one layout, one pytree with its codec and its exact bytes."""

from jmla.layouts.base import KVLayout as KVLayout
from jmla.layouts.base import Rows as Rows
from jmla.layouts.base import ScaleFormat as ScaleFormat
from jmla.layouts.bf16 import BF16Rows as BF16Rows
from jmla.layouts.block_scale import BlockScaleRows as BlockScaleRows
from jmla.layouts.codec import convert as convert
from jmla.layouts.codec import dequantize as dequantize
from jmla.layouts.codec import from_bytes as from_bytes
from jmla.layouts.codec import quantize as quantize
from jmla.layouts.codec import to_bytes as to_bytes
from jmla.layouts.codec import zero_rows as zero_rows
from jmla.layouts.fp4 import FP4Rows as FP4Rows
from jmla.layouts.fp8 import FP8Rows as FP8Rows
from jmla.layouts.index_keys import IndexKeyRows as IndexKeyRows
from jmla.layouts.index_keys import index_keys_from_bytes as index_keys_from_bytes
from jmla.layouts.index_keys import quantize_index_keys as quantize_index_keys
from jmla.layouts.packed_block_scale import PackedBlockScaleRows as PackedBlockScaleRows
from jmla.layouts.paged_index_keys import PagedIndexKeyRows as PagedIndexKeyRows
from jmla.layouts.paged_index_keys import paged_index_keys as paged_index_keys
from jmla.layouts.paged_v4 import PagedV4Rows as PagedV4Rows
from jmla.layouts.v4 import V4Rows as V4Rows
