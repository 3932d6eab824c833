"""Products of one warp, with all operands in registers (`mma.sync`), and bf16 operands for them.

D[16, 8] += A[16, 16] B[16, 8]. Of D, and of A, the thread of quad q and column c holds rows q and
q + 8; of A, columns 2c, 2c + 1, 2c + 8 and 2c + 9; of D, columns 2c and 2c + 1; of B, those rows
of A's columns and column q. A fragment of A is four words: the first pair of the upper and of the
lower row, then the second pair of both. One of B is two words. D is four floats, the upper row's
first.
"""

from collections.abc import Sequence

from pallas_kernels.device.simt import Value, choose_bits, ptx

# A bf16 of the bits of an e2m1 code is 2^-126 of its value.
E2M1_POWER = -126


def multiply_add(d: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
    """d + a b of bf16, summed in f32."""
    return ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        *a,
        *b,
        *d,
        out="ffff",
        pure=True,
        convergent=True,
    )


def bf16_of_e4m3(word: Value) -> list[Value]:
    """Four e4m3 codes as two pairs of bf16, exactly; NaN codes are NaN."""
    return ptx(
        "{ .reg .b16 low, high, a, b, c, d; .reg .b32 ab, cd; .reg .f32 fa, fb, fc, fd; "
        "mov.b32 {low, high}, $2; "
        "cvt.rn.f16x2.e4m3x2 ab, low; cvt.rn.f16x2.e4m3x2 cd, high; "
        "mov.b32 {a, b}, ab; mov.b32 {c, d}, cd; "
        "cvt.f32.f16 fa, a; cvt.f32.f16 fb, b; cvt.f32.f16 fc, c; cvt.f32.f16 fd, d; "
        "cvt.rn.bf16x2.f32 $0, fb, fa; cvt.rn.bf16x2.f32 $1, fd, fc; }",
        word,
        out="rr",
        pure=True,
    )


def bf16_of_e2m1(word: Value) -> list[Value]:
    """Eight e2m1 codes as four pairs of bf16, of the codes i and i + 4: 2^-126 of their values."""
    pairs = []
    for i in range(4):
        left = 6 - 4 * i
        magnitude = word << left if left > 0 else word >> -left
        both = choose_bits(word << (12 - 4 * i), magnitude, _signed(0x80008000))
        pairs.append(both & _signed(0x81C081C0))
    return pairs


def _signed(word: int) -> int:
    return word - (1 << 32)
