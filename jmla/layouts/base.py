"""What all rows of a cache share: their names, their token axes, and access by slot.

A layout's rows are a pytree whose array leaves all begin with the same token axes, for example
`(slots,)` or `(pages, page_size)`. Rank, rope width and scale format are static fields, so that
nothing is ever guessed from a shape, and two formats of equal shape have different tree structures.

Constructors of the dataclasses check nothing: JAX rebuilds them with tracers, None and
ShapeDtypeStruct as leaves. `zeros`, `encode`, `unpack` and `check` do.
"""

import abc
import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int, Int32, UInt8

ScaleFormat = Literal["pow2", "fp32"]
"""Which numbers a block's scale may be: powers of two only, or any float32."""

E4M3_MAX = 448.0
BLOCK_SCALE_TILE = 128
FP4_BLOCK = 16
V4_TILE = 64


class KVLayout(enum.Enum):
    """How one token's latent row is stored. The members are static and hashable."""

    BF16 = "bf16"
    FP8_NOPE_FP8_ROPE = "fp8_nope_fp8_rope"
    FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE = "fp8_nope_with_block_scale_bf16_rope"
    FP4 = "fp4"
    FP8_V4 = "fp8_v4"

    @property
    def default_rank(self) -> int:
        """The number of no-position values of the published models: 448 for FP8_V4, else 512."""
        return 448 if self is KVLayout.FP8_V4 else 512

    def bytes_per_token(self, rank: int | None = None, rope_dim: int = 64) -> int:
        """Bytes of one packed row; for FP8_V4 with its share of the page's scale bytes.

        Args:
            rank: number of no-position values; None takes `default_rank`.
            rope_dim: number of rotary values.
        """
        rank = self.default_rank if rank is None else rank
        match self:
            case KVLayout.BF16:
                return 2 * (rank + rope_dim)
            case KVLayout.FP8_NOPE_FP8_ROPE:
                return rank + rope_dim
            case KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE:
                return rank + 4 * (rank // BLOCK_SCALE_TILE) + 2 * rope_dim
            case KVLayout.FP4:
                return (rank + rope_dim) // 2 + (rank + rope_dim) // FP4_BLOCK
            case KVLayout.FP8_V4:
                return rank + 2 * rope_dim + v4_scale_bytes(rank)


def v4_scale_bytes(rank: int) -> int:
    """Scale bytes per token of an FP8_V4 page: one per 64 values, padded to a multiple of 8."""
    return -(-rank // (8 * V4_TILE)) * 8


@dataclasses.dataclass(frozen=True)
class TokenRows(abc.ABC):
    """Arrays with one row per token and common leading token axes."""

    @property
    @abc.abstractmethod
    def token_leaves(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """Name -> (shape of one token's part, dtype), for each leaf that has a row per token."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The token axes."""
        name, (per_token, _) = next(iter(self.token_leaves.items()))
        leaf_shape = getattr(self, name).shape
        return tuple(leaf_shape[: len(leaf_shape) - len(per_token)])

    @property
    def num_slots(self) -> int:
        """The number of rows: the product of the token axes."""
        return math.prod(self.shape)

    @abc.abstractmethod
    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """Quantises bf16 or f32 values to the format of these rows, whose data is not used."""

    def check(self) -> None:
        """Raises ValueError unless each leaf has the dtype and shape that the layout names."""
        token_axes = self.shape
        for name, (per_token, dtype) in self.token_leaves.items():
            leaf = getattr(self, name)
            if leaf.dtype != dtype or leaf.shape != (*token_axes, *per_token):
                raise ValueError(
                    f"{type(self).__name__}.{name}: {leaf.shape=} {leaf.dtype=}: expected shape "
                    f"{(*token_axes, *per_token)} and dtype {jnp.dtype(dtype).name}; build rows "
                    "with quantize, from_bytes or init_cache"
                )

    def reshape(self, *token_axes: int) -> Self:
        """The same rows under other token axes; one of them may be -1."""
        if -1 in token_axes:
            known = -math.prod(token_axes)
            fitted = self.num_slots // known if known else 0
            token_axes = tuple(fitted if axis == -1 else axis for axis in token_axes)
        if math.prod(token_axes) != self.num_slots or min(token_axes, default=0) < 0:
            raise ValueError(
                f"{token_axes=}: expected axes with product {self.num_slots}, the number of rows "
                f"of token shape {self.shape}"
            )
        n = len(self.shape)
        return self.map_tokens(lambda leaf: leaf.reshape(*token_axes, *leaf.shape[n:]))

    def flat(self) -> Self:
        """The same rows with token axes merged to `(num_slots,)`."""
        return self if len(self.shape) == 1 else self.reshape(self.num_slots)

    def gather(self, slots: Int[Array, "..."]) -> Self:
        """The rows at `slots`, in token shape `slots.shape`.

        Args:
            slots: int32 of any shape. A slot outside `[0, num_slots)` gives a row of zeros,
                whatever the cache holds; a negative slot is not counted from the end.
        """
        check_slots(slots)
        return self.flat().map_tokens(lambda leaf: _take(leaf, slots))

    def set(self, slots: Int[Array, "..."], new: Self) -> Self:
        """These rows with `new` stored at `slots`.

        Args:
            slots: int32 of any shape. A slot outside `[0, num_slots)` is dropped; a negative slot
                is not counted from the end. Of duplicates, an unspecified one stays.
            new: rows of the same format with token shape `slots.shape`.

        Raises:
            ValueError: `new` is of another format (class, rank, rope width, scale format, with or
                without a scale for the tensor), or of another token shape.
        """
        check_slots(slots)
        ours: object = jax.tree.structure(self)
        theirs: object = jax.tree.structure(new)
        if ours != theirs:
            raise ValueError(f"new rows are {theirs}: expected the format of the cache, {ours}")
        if new.shape != slots.shape:
            raise ValueError(f"{new.shape=}: expected one row per slot, {slots.shape=}")
        stored = self.flat().map_tokens(lambda leaf, rows: _put(leaf, slots, rows), new)
        return stored.reshape(*self.shape)

    def map_tokens(self, fn: Callable[..., Array], *others: Self) -> Self:
        """`fn` of each leaf that has a row per token, with that leaf of the `others`."""
        leaves = {
            name: fn(getattr(self, name), *(getattr(other, name) for other in others))
            for name in self.token_leaves
        }
        return dataclasses.replace(self, **leaves)


@dataclasses.dataclass(frozen=True)
class Rows(TokenRows):
    """Latent rows of one `KVLayout`: `rank` no-position values, then `rope_dim` rotary values."""

    layout: ClassVar[KVLayout]

    rank: int = dataclasses.field(kw_only=True, metadata={"static": True})
    rope_dim: int = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def width(self) -> int:
        """The length of a latent, and of a query's last axis."""
        return self.rank + self.rope_dim

    @property
    def value_dim(self) -> int:
        """How many leading values of a row are its attention value: an output's last axis."""
        return self.rank

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one packed row."""
        return self.layout.bytes_per_token(self.rank, self.rope_dim)

    @abc.abstractmethod
    def encode(self, latents: Float[Array, "*tokens width"]) -> Self:
        """Quantises bf16 or f32 latents to the format of these rows, whose data is not used."""

    @abc.abstractmethod
    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        """The latents: an f32 product, rounded once to bf16."""

    @abc.abstractmethod
    def pack(self, *, page_bytes: int | None = None) -> UInt8[Array, "*tokens bytes"]:
        """The rows as bytes; `page_bytes` is for FP8_V4 alone."""

    @abc.abstractmethod
    def unpack(
        self, packed: UInt8[Array, "*tokens bytes"], *, page_size: int | None = None
    ) -> Self:
        """The reverse of `pack`, to the format of these rows, whose data is not used."""


def _take(leaf: Array, slots: Int[Array, "..."]) -> Array:
    if leaf.shape[0] == 0:  # JAX refuses to gather from an empty axis
        return jnp.zeros((*slots.shape, *leaf.shape[1:]), leaf.dtype)
    taken = movable(leaf).at[slots].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return _moved(taken, leaf)


def _put(leaf: Array, slots: Int[Array, "..."], rows: Array) -> Array:
    stored = movable(leaf).at[slots].set(movable(rows), mode="drop", wrap_negative_indices=False)
    return _moved(stored, leaf)


def movable(leaf: Array) -> Array:
    """A leaf as what rows are gathered and scattered as: 8-bit floats as bytes."""
    # XLA's CPU backend widens a gather or scatter of 8-bit floats, and with it the whole cache.
    if leaf.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint8)
    return leaf


def _moved(moved: Array, leaf: Array) -> Array:
    """What was moved, in the leaf's dtype again."""
    # A bitcast has no derivative, even one that changes nothing.
    if moved.dtype == leaf.dtype:
        return moved
    return jax.lax.bitcast_convert_type(moved, leaf.dtype)


def page_slots(
    pages: Int[Array, "..."], num_pages: int, page_size: int
) -> Int32[Array, "... page_size"]:
    """The slots of pages; -1 for all of a page that does not exist.

    Args:
        pages: int32 of any shape.
        num_pages: pages of the cache.
        page_size: tokens of a page.
    """
    check_slots(pages)
    exists = ((pages >= 0) & (pages < num_pages))[..., None]
    first = jnp.where(exists, pages[..., None], 0) * page_size
    shape = (*pages.shape, page_size)
    place = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return jnp.where(exists, first + place, -1)


def check_slots(slots: Int[Array, "..."]) -> None:
    """Raises ValueError unless `slots` is an int32 array."""
    if slots.dtype != jnp.int32:
        raise ValueError(f"{slots.dtype=}: expected int32; cast with slots.astype(jnp.int32)")


def check_latents(latents: Float[Array, "*tokens width"], width: int) -> None:
    """Raises ValueError unless `latents` is a bf16 or f32 array of rows of length `width`."""
    if latents.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{latents.dtype=}: expected bfloat16 or float32; cast the latents")
    if latents.ndim == 0 or latents.shape[-1] != width:
        raise ValueError(
            f"{latents.shape=}: expected a last axis of {width}, rank plus rope_dim; pass the "
            "rank and rope_dim of the model"
        )


def check_multiple(layout: KVLayout, of: int, *, rank: int, rope_dim: int) -> None:
    """Raises ValueError unless the layout's blocks of `of` values divide `rank`."""
    if rank <= 0 or rank % of or rope_dim < 0:
        raise ValueError(
            f"{rank=} {rope_dim=}: {layout.name} expects a positive rank that is a multiple of "
            f"{of} and a rope_dim of 0 or more; choose another layout for this model"
        )


def check_scale_format(scale_format: ScaleFormat) -> None:
    """Raises ValueError for anything but the two scale formats."""
    if scale_format not in get_args(ScaleFormat):
        raise ValueError(
            f"{scale_format=}: expected 'pow2' (FlashMLA's powers of two) or 'fp32' (SGLang's "
            "amax / 448)"
        )
