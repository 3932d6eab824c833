"""How each format's rows are made of parts: by name of the cache's arrays, for any sizes."""

import dataclasses

from pallas_kernels.cache_codec.chunk import CHUNK
from pallas_kernels.cache_codec.e2m1 import E2M1Part
from pallas_kernels.cache_codec.e4m3 import ByteScalePart, F32ScalePart, TensorPart
from pallas_kernels.cache_codec.parts import BF16Part, F32Part, Part
from pallas_kernels.cache_codec.places import Field, Pages
from pallas_kernels.cache_codec.raw import NormPart, RotaryPart

_BLOCK_SCALE_TILE, _V4_TILE, _FP4_BLOCK = 128, 64, 16
_POW2_FLOOR, _INDEX_POW2_FLOOR = -13, -22
_SMALLEST_INDEX_AMAX = 1e-4
WIDEST = 16  # bytes of the widest load
WORD = 4


@dataclasses.dataclass(frozen=True)
class Format:
    """The parts of a row, and where rows lie.

    Attributes:
        parts: in the order of a row's values, without gaps.
        pages: see `Pages`; None for rows that lie one behind the other.
    """

    parts: tuple[Part, ...]
    pages: Pages | None = None

    def problems(self) -> list[str]:
        """Why rows cannot be read and written in whole chunks; empty if they can."""
        found = []
        for part in self.parts:
            # Of pairs that are no neighbours, both halves are read in chunks.
            paired = isinstance(part, RotaryPart) and not part.interleaved
            if (
                part.start % CHUNK
                or part.stop % CHUNK
                or (part.stop - part.start) % (CHUNK * (1 + paired))
            ):
                found.append(
                    f"values {part.start} to {part.stop} of a row are encoded alike: expected "
                    f"multiples of {CHUNK * (1 + paired)}"
                )
            for field, size in _accesses(part):
                places = {field.offset, field.stride, self.pages.stride if self.pages else 0}
                if any(place % size for place in places):
                    found.append(
                        f"{field}: expected offsets and strides that are multiples of {size} bytes"
                    )
        return found


def latents(width: int, array: str = "latents", *, f32: bool = False) -> Format:
    """bf16 or f32 values and nothing else."""
    if f32:
        return Format((F32Part(start=0, stop=width, values=Field(array, 0, 4 * width)),))
    return Format((BF16Part(start=0, stop=width, values=Field(array, 0, 2 * width)),))


def raw_latents(
    rank: int, rope_dim: int, *, eps: float, interleaved: bool, f32: bool, f32_gain: bool
) -> Format:
    """bf16 or f32 values before RMSNorm, of the first `rank`, and RoPE, of the others.

    Args:
        rank: values that are normalised.
        rope_dim: values that are rotated.
        eps: of the norm.
        interleaved: whether pairs are neighbours, or (i, i + rope_dim / 2).
        f32: whether values are f32.
        f32_gain: whether gains are.
    """
    size, kind = (4, F32Part) if f32 else (2, BF16Part)
    stride = size * (rank + rope_dim)
    gain_kind = F32Part if f32_gain else BF16Part
    norm = NormPart(
        start=0,
        stop=rank,
        values=kind(start=0, stop=rank, values=Field("latents", 0, stride)),
        gain=gain_kind(start=0, stop=rank, values=Field("gain", 0, 0)),
        eps=eps,
    )
    if rope_dim == 0:
        return Format((norm,))
    stop = rank + rope_dim
    rotary = RotaryPart(
        start=rank,
        stop=stop,
        values=kind(start=rank, stop=stop, values=Field("latents", size * rank, stride)),
        cos=Field("cos", 0, 2 * rope_dim),
        sin=Field("sin", 0, 2 * rope_dim),
        interleaved=interleaved,
    )
    return Format((norm, rotary))


def fp8(width: int, *, scaled: bool) -> Format:
    """e4m3 values, and a scale for the whole tensor."""
    codes = Field("values", 0, width)
    return Format(
        (TensorPart(start=0, stop=width, codes=codes, scale="scale" if scaled else None),)
    )


def block_scale(rank: int, rope_dim: int, *, pow2: bool, packed: bool) -> Format:
    """e4m3 values with an f32 scale per 128, then bf16 rotary values."""
    scale_bytes = 4 * (rank // _BLOCK_SCALE_TILE)
    if packed:
        stride = rank + scale_bytes + 2 * rope_dim
        fields = [Field("packed", offset, stride) for offset in (0, rank, rank + scale_bytes)]
    else:
        sizes = {"nope": rank, "scales": scale_bytes, "rope": 2 * rope_dim}
        fields = [Field(name, 0, size) for name, size in sizes.items()]
    codes, scales, rope = fields
    nope = F32ScalePart(
        start=0,
        stop=rank,
        codes=codes,
        scale=scales,
        block=_BLOCK_SCALE_TILE,
        pow2=pow2,
        smallest_amax=0.0,
        floor=_POW2_FLOOR,
    )
    return _with_rope(nope, rope, rope_dim)


def fp4(width: int) -> Format:
    """e2m1 values with a scale byte per 16."""
    codes = Field("packed", 0, width // 2)
    scale = Field("exponents", 0, width // _FP4_BLOCK)
    return Format((E2M1Part(start=0, stop=width, codes=codes, scale=scale),))


def v4(rank: int, rope_dim: int, *, pages: Pages | None = None) -> Format:
    """e4m3 values with a scale byte per 64, then bf16 rotary values.

    Args:
        rank: number of e4m3 values.
        rope_dim: number of rotary values.
        pages: of an array "packed", where a page has its tokens' values, then their scale bytes,
            padded to 8 for each; None for arrays of their own.
    """
    blocks, values = rank // _V4_TILE, rank + 2 * rope_dim
    footer = -(-blocks // 8) * 8
    if pages is None:
        sizes = {"nope": rank, "exponents": blocks, "rope": 2 * rope_dim}
        codes, scale, rope = (Field(name, 0, size) for name, size in sizes.items())
    else:
        codes, rope = (Field("packed", offset, values) for offset in (0, rank))
        scale = Field("packed", pages.size * values, footer)
    nope = ByteScalePart(
        start=0,
        stop=rank,
        codes=codes,
        scale=scale,
        block=_V4_TILE,
        floor=_POW2_FLOOR,
        padding=0 if pages is None else footer - blocks,
    )
    return dataclasses.replace(_with_rope(nope, rope, rope_dim), pages=pages)


def index_keys(dim: int, *, pow2: bool, pages: Pages | None = None) -> Format:
    """e4m3 values with one f32 scale.

    Args:
        dim: number of values.
        pow2: whether scales are powers of two.
        pages: of an array "packed", where a page has its tokens' values, then their scales; None
            for arrays of their own.
    """
    codes, scale = Field("keys", 0, dim), Field("scales", 0, WORD)
    if pages is not None:
        codes, scale = Field("packed", 0, dim), Field("packed", pages.size * dim, WORD)
    return Format(
        (
            F32ScalePart(
                start=0,
                stop=dim,
                codes=codes,
                scale=scale,
                block=dim,
                pow2=pow2,
                smallest_amax=_SMALLEST_INDEX_AMAX,
                floor=_INDEX_POW2_FLOOR,
            ),
        ),
        pages,
    )


def _with_rope(nope: Part, values: Field, rope_dim: int) -> Format:
    if rope_dim == 0:
        return Format((nope,))
    return Format((nope, BF16Part(start=nope.stop, stop=nope.stop + rope_dim, values=values)))


def _accesses(part: Part) -> list[tuple[Field, int]]:
    """Each field of a part and the bytes that a thread reads of it at once."""
    match part:
        case BF16Part() | F32Part():
            return [(part.values, WIDEST)]
        case NormPart():
            return [*_accesses(part.values), *_accesses(part.gain)]
        case RotaryPart():
            return [*_accesses(part.values), (part.cos, WIDEST), (part.sin, WIDEST)]
        case F32ScalePart():
            return [(part.codes, CHUNK), (part.scale, WORD)]
        case ByteScalePart() | TensorPart():
            return [(part.codes, CHUNK)]
        case E2M1Part():
            return [(part.codes, CHUNK // 2)]
    raise AssertionError(f"{part=}: expected one of the parts above")
