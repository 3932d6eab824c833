"""One head of a token, by 8 or 16 neighbouring lanes of eight values each."""

from collections.abc import Mapping, Sequence

from pallas_kernels.cache_codec.chunk import CHUNK, Chunk
from pallas_kernels.cache_codec.formats import index_keys
from pallas_kernels.device.memory import load_global, store_global
from pallas_kernels.device.simt import (
    Value,
    block_thread,
    minimum,
    select,
    shuffle_xor,
    when,
)
from pallas_kernels.index_query.shape import Shape

_PAIRS = CHUNK // 2


def prepare(shape: Shape, arrays: Mapping[str, Value], first: Value) -> None:
    """What each thread does; `first` is the number of the block's first chunk."""
    unit = first + block_thread()
    chunk, row = unit % shape.lanes, unit // shape.lanes
    exists = row < shape.rows
    row = minimum(row, shape.rows - 1)
    (weight,) = load_global(arrays["weights"] + row.wide() * 4, "f")
    values = Chunk(_load(shape, arrays["q"], row.wide() * shape.dim + chunk.wide() * CHUNK))
    if shape.rope_dim:
        rotated = _by_position(shape, arrays, row // shape.heads, chunk, values)
        if shape.rope_dim < shape.dim:
            front = chunk < shape.rope_dim // CHUNK
            pairs = zip(rotated.raw, values.raw, strict=True)
            rotated = Chunk([select(front, a, b) for a, b in pairs])
        values = rotated
    if shape.hadamard:
        values = _hadamard(shape, chunk, values)
    (part,) = index_keys(shape.dim, pow2=shape.pow2).parts
    *codes, scale = part.encode(values, None)

    def store() -> None:
        store_global(arrays["codes"] + row.wide() * shape.dim + chunk.wide() * CHUNK, codes)
        place = arrays["scaled"] + row.wide() * 4
        when(chunk.equals(0), lambda: store_global(place, [weight * scale.as_f32()]))

    when(exists, store)


def _load(shape: Shape, base: Value, place: Value) -> list[Value]:
    if not shape.f32:
        return load_global(base + place * 2, "rrrr")
    return [x for half in range(2) for x in load_global(base + place * 4, "ffff", 16 * half)]


def _rounded(shape: Shape, floats: Sequence[Value]) -> Chunk:
    """In the dtype of the queries, as one operation after the other would leave them."""
    return Chunk(floats) if shape.f32 else Chunk.rounded(floats)


def _by_position(
    shape: Shape, arrays: Mapping[str, Value], token: Value, chunk: Value, values: Chunk
) -> Chunk:
    """Rotated values; those behind the rotary ones are to be left out."""
    line = token.wide() * (shape.rope_dim * 2)

    def angles(first: Value, count: int) -> list[list[Value]]:
        return [
            [
                x
                for i in range(0, count, 4)
                for x in load_global(arrays[name] + line + first.wide() * 4, "ffff", 4 * i)
            ]
            for name in ("cos", "sin")
        ]

    if shape.interleaved:
        own = minimum(chunk, shape.rope_dim // CHUNK - 1)
        cos, sin = angles(own * _PAIRS, _PAIRS)
        x, rotated = values.floats(), []
        for i in range(_PAIRS):
            even, odd = x[2 * i], x[2 * i + 1]
            rotated += [even * cos[i] - odd * sin[i], even * sin[i] + odd * cos[i]]
        return _rounded(shape, rotated)
    half = shape.rope_dim // 2 // CHUNK
    others = Chunk([shuffle_xor(x, half) for x in values.raw])
    cos, sin = angles((chunk & (half - 1)) * CHUNK, CHUNK)
    second = (chunk & half).equals(half)
    sin = [select(second, x, x * -1.0) for x in sin]
    pairs = zip(values.floats(), others.floats(), strict=True)
    return _rounded(shape, [x * cos[i] + y * sin[i] for i, (x, y) in enumerate(pairs)])


def _hadamard(shape: Shape, chunk: Value, values: Chunk) -> Chunk:
    """Sums and differences of neighbours, of pairs of these and so on, over sqrt(dim)."""
    x = list(values.floats())
    for distance in (1, 2, 4):
        for i in range(CHUNK):
            if not i & distance:
                a, b = x[i], x[i + distance]
                x[i], x[i + distance] = a + b, a - b
    distance = 1
    while distance < shape.lanes:
        upper = (chunk & distance).equals(distance)
        for i, mine in enumerate(x):
            other = shuffle_xor(mine, distance)
            x[i] = select(upper, other - mine, mine + other)
        distance *= 2
    return _rounded(shape, [each * shape.dim**-0.5 for each in x])
