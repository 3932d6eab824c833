"""Index keys as they are, in bf16: twice the bytes of e4m3 keys, and nothing to quantise."""

import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32

from jmla.layouts._scales import to_bf16
from jmla.layouts.base import TokenRows, check_latents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BF16IndexKeyRows(TokenRows):
    """Index keys: 2 dim bytes per token. Queries of them are bf16, with plain head weights.

    Attributes:
        keys: bf16; f32 keys are rounded to nearest even.
    """

    keys: BFloat16[Array, "*tokens dim"]

    # There is nothing to spread over a key's values before it is quantised.
    hadamard = False

    @property
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """See `TokenRows.token_leaves`."""
        return {"keys": ((self.dim,), jnp.bfloat16)}

    @property
    def dim(self) -> int:
        """The length of a key."""
        return self.keys.shape[-1]

    @property
    def scales(self) -> Float32[Array, "*tokens"]:
        """Ones."""
        return jnp.ones(self.shape, jnp.float32)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one key."""
        return 2 * self.dim

    @classmethod
    def zeros(cls, shape: tuple[int, ...], *, dim: int) -> Self:
        """Keys of zeros with token axes `shape`."""
        if dim < 1:
            raise ValueError(f"{dim=}: expected 1 or more, the length of an index key")
        return cls(jnp.zeros((*shape, dim), jnp.bfloat16))

    def encode(self, keys: Float[Array, "*tokens dim"]) -> Self:
        """Rounds bf16 or f32 keys; the data of these rows is not used."""
        check_latents(keys, self.dim)
        return dataclasses.replace(self, keys=to_bf16(keys))

    def dequantize(self) -> BFloat16[Array, "*tokens dim"]:
        """The keys, unchanged."""
        return self.keys
