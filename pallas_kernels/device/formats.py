"""The formats that kernels read, by name."""

import dataclasses
import types
from collections.abc import Mapping

from pallas_kernels.device.fp4_format import FP4Format
from pallas_kernels.device.row_formats import Part, RowFormat
from pallas_kernels.device.v4_format import V4Format

_BLOCK_SCALE = RowFormat(
    nope=Part("nope", 0, 512),
    nope_bytes=512,
    rope=Part("rope", 0, 128),
    rope_bytes=128,
    scale=Part("scales", 0, 16),
    dtype="f16",
    rope_dtype="bf16",
)
_PACKED_BLOCK_SCALE = dataclasses.replace(
    _BLOCK_SCALE,
    nope=Part("packed", 0, 656),
    scale=Part("packed", 512, 656),
    rope=Part("packed", 528, 656),
)
_V4 = V4Format(
    nope=Part("nope", 0, 448),
    nope_bytes=512,
    rope=Part("rope", 0, 128),
    rope_bytes=128,
    scale=Part("exponents", 0, 7),
    dtype="f16",
    rope_dtype="bf16",
    parts=7,
    scale_columns=64,
    stored_bytes=448,
    rope_is_value=True,
)

FORMATS: Mapping[str, RowFormat] = types.MappingProxyType(
    {
        "block_scale_pow2": _BLOCK_SCALE,
        "block_scale_fp32": dataclasses.replace(_BLOCK_SCALE, scales_are_powers=False),
        "packed_block_scale_pow2": _PACKED_BLOCK_SCALE,
        "packed_block_scale_fp32": dataclasses.replace(
            _PACKED_BLOCK_SCALE, scales_are_powers=False
        ),
        "fp8": RowFormat(
            nope=Part("values", 0, 576),
            nope_bytes=512,
            rope=Part("values", 512, 576),
            rope_bytes=64,
            scale=None,
            dtype="f16",
            rope_dtype="f16",
        ),
        "fp4": FP4Format(
            nope=Part("packed", 0, 288),
            nope_bytes=256,
            rope=Part("packed", 256, 288),
            rope_bytes=32,
            scale=Part("exponents", 0, 36),
            dtype="f16",
            rope_dtype="f16",
            scale_columns=16,
            partner=4,
        ),
        "v4": _V4,
        "paged_v4": dataclasses.replace(
            _V4,
            nope=Part("packed", 0, 576),
            rope=Part("packed", 448, 576),
            scale=Part("packed", 0, 8, behind=576),
        ),
        "bf16": RowFormat(
            nope=Part("latents", 0, 1152),
            nope_bytes=1024,
            rope=Part("latents", 1024, 1152),
            rope_bytes=128,
            scale=None,
            dtype="bf16",
            rope_dtype="bf16",
        ),
    }
)
