"""Rows of a cache, written, read and converted at the speed of memory."""

from pallas_kernels.cache_codec.call import Side as Side
from pallas_kernels.cache_codec.call import transcode as transcode
from pallas_kernels.cache_codec.formats import Format as Format
from pallas_kernels.cache_codec.formats import block_scale as block_scale
from pallas_kernels.cache_codec.formats import fp4 as fp4
from pallas_kernels.cache_codec.formats import fp8 as fp8
from pallas_kernels.cache_codec.formats import index_keys as index_keys
from pallas_kernels.cache_codec.formats import latents as latents
from pallas_kernels.cache_codec.formats import raw_latents as raw_latents
from pallas_kernels.cache_codec.formats import v4 as v4
from pallas_kernels.cache_codec.places import Pages as Pages
