"""What a launch computes."""

import dataclasses

from pallas_kernels.cache_codec.chunk import CHUNK


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a launch.

    Attributes:
        tokens: at least one.
        heads: of a token.
        dim: of a head: 64 or 128.
        rope_dim: values at the front that are rotated by position: 0, 16, 32, 64 or 128.
        interleaved: whether pairs of these are neighbours; else half of them apart.
        hadamard: whether heads are multiplied by a Hadamard matrix afterwards.
        pow2: whether scales are powers of two, or amax / 448.
        f32: whether queries are not bf16.
    """

    tokens: int
    heads: int
    dim: int
    rope_dim: int
    interleaved: bool
    hadamard: bool
    pow2: bool
    f32: bool

    @property
    def rows(self) -> int:
        """Heads of all tokens."""
        return self.tokens * self.heads

    @property
    def lanes(self) -> int:
        """Threads that share a row."""
        return self.dim // CHUNK
