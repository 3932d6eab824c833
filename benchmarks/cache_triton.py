"""The Triton kernels of `benchmarks.cache_peer`; imported only where Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def quantize(x, rows, slots, by_slot: tl.constexpr):
    """bf16 [n, 576] to 656-byte rows with power-of-two scales, in order or at slots."""
    token = tl.program_id(0).to(tl.int64)
    target = token
    if by_slot:
        target = tl.load(slots + token).to(tl.int64)
    if target >= 0:
        row = rows + target * 656
        tile, column = tl.arange(0, 4), tl.arange(0, 128)
        place = tile[:, None] * 128 + column[None, :]
        values = tl.load(x + token * 576 + place).to(tl.float32)
        amax = tl.max(tl.abs(values), axis=1)
        exponent = tl.maximum(tl.ceil(tl.log2(amax / 448.0)), -13.0)
        codes = (values * tl.exp2(-exponent)[:, None]).to(tl.float8e4nv)
        tl.store((row + place).to(tl.pointer_type(tl.float8e4nv)), codes)
        tl.store((row + 512).to(tl.pointer_type(tl.float32)) + tile, tl.exp2(exponent))
        rope = tl.arange(0, 64)
        rotary = tl.load(x + token * 576 + 512 + rope)
        tl.store((row + 528).to(tl.pointer_type(tl.bfloat16)) + rope, rotary)


@triton.jit
def quantize_keys(x, rows, slots):
    """bf16 index keys [n, 128] to 132-byte rows with scales amax / 448, at slots."""
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(slots + token).to(tl.int64)
    if target >= 0:
        row, column = rows + target * 132, tl.arange(0, 128)
        values = tl.load(x + token * 128 + column).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-4) / 448.0
        tl.store(
            (row + column).to(tl.pointer_type(tl.float8e4nv)), (values / scale).to(tl.float8e4nv)
        )
        tl.store((row + 128).to(tl.pointer_type(tl.float32)), scale)


@triton.jit
def dequantize(rows, out, slots, by_slot: tl.constexpr):
    """656-byte rows to bf16 [n, 576], in order or at slots."""
    token = tl.program_id(0).to(tl.int64)
    source = token
    if by_slot:
        source = tl.load(slots + token).to(tl.int64)
    row = rows + source * 656
    tile, column = tl.arange(0, 4), tl.arange(0, 128)
    place = tile[:, None] * 128 + column[None, :]
    codes = tl.load((row + place).to(tl.pointer_type(tl.float8e4nv))).to(tl.float32)
    scales = tl.load((row + 512).to(tl.pointer_type(tl.float32)) + tile)
    tl.store(out + token * 576 + place, (codes * scales[:, None]).to(tl.bfloat16))
    rope = tl.arange(0, 64)
    rotary = tl.load((row + 528).to(tl.pointer_type(tl.bfloat16)) + rope)
    tl.store(out + token * 576 + 512 + rope, rotary)


@triton.jit
def requantize(codes, rows):
    """576 e4m3 values to 656-byte rows with scales 1."""
    token = tl.program_id(0).to(tl.int64)
    row, column = rows + token * 656, tl.arange(0, 512)
    tl.store(row + column, tl.load(codes + token * 576 + column))
    tile = tl.arange(0, 4)
    tl.store((row + 512).to(tl.pointer_type(tl.float32)) + tile, tile.to(tl.float32) * 0.0 + 1.0)
    rope = tl.arange(0, 64)
    rotary = tl.load((codes + token * 576 + 512 + rope).to(tl.pointer_type(tl.float8e4nv)))
    tl.store((row + 528).to(tl.pointer_type(tl.bfloat16)) + rope, rotary.to(tl.bfloat16))
