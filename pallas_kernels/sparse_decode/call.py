"""The launches of a call."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.row_formats import RANK, RowFormat
from pallas_kernels.sparse_decode import narrow, wide
from pallas_kernels.sparse_decode.join import join
from pallas_kernels.sparse_decode.program import Program, launch
from pallas_kernels.sparse_decode.tuning import Choice, Shape, choose, tuning_for

class KeyList(NamedTuple):
    """Keys of `n` queries.

    Attributes:
        format: one of `FORMATS`.
        arrays: the cache, as the format names its arrays.
        indices: int32 [n, topk], slots; any slot outside the cache is masked.
        lengths: int32 [n], how many of a query's slots count, or None for all.
        page_size: slots of a page, for formats whose array is one of pages [pages, bytes].
    """

    format: str
    arrays: Mapping[str, Array]
    indices: Int[Array, "n topk"]
    lengths: Int[Array, " n"] | None
    page_size: int | None = None

    @property
    def num_slots(self) -> int:
        """Rows of the cache."""
        return self._rows_array.shape[0] * (self.page_size or 1)

    @property
    def pages(self) -> tuple[int, int] | None:
        """See `Shape.pages`."""
        return (self.page_size, self._rows_array.shape[1]) if self.page_size else None

    @property
    def _rows_array(self) -> Array:
        return self.arrays[FORMATS[self.format].nope.array]


def sparse_decode(
    q: BFloat16[Array, "n h width"],
    lists: Sequence[KeyList],
    *,
    sm_scale: float | Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
    num_splits: int | None,
) -> tuple[BFloat16[Array, "n h 512"], Float[Array, "n h"]]:
    """Attention of `n` queries to the keys of all lists.

    Args:
        q: bf16 [n, h, width], of the lists' formats; n and h at least 1.
        lists: one or more.
        sm_scale: factor on the logits.
        attn_sink: f32 [h], the logit of a key of value zero, or None.
        num_splits: parts of each list; None chooses by the shapes.

    Returns:
        out, bf16 [n, h, 512], and lse, f32 [n, h], natural and without the sink.
    """
    n, heads, _ = q.shape
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    choices = [
        choose(FORMATS[each.format], n, heads, each.indices.shape[1], num_splits) for each in lists
    ]
    final = len(lists) == 1 and choices[0].splits == 1
    results = []
    for each, choice in zip(lists, choices, strict=True):
        row_format = FORMATS[each.format]
        shape = Shape(
            n=n,
            heads=heads,
            topk=each.indices.shape[1],
            num_slots=each.num_slots,
            splits=choice.splits,
            final=final,
            has_lengths=each.lengths is not None,
            has_sink=final and attn_sink is not None,
            has_scale="scale" in each.arrays,
            pages=each.pages,
        )
        operands = {"q": q, "indices": each.indices, "sm_scale": scale, **each.arrays}
        if "scale" in operands:
            operands["scale"] = operands["scale"].reshape(1)
        if each.lengths is not None:
            operands["lengths"] = each.lengths
        if shape.has_sink and attn_sink is not None:
            operands["sink"] = attn_sink
        results.append(_launch(_program(row_format, choice), shape, operands))
    if final:
        return results[0][0][0], results[0][1][0]
    return join(results, attn_sink)


def _program(row_format: RowFormat, choice: Choice) -> Program:
    if choice.wide:
        return wide.program(row_format)
    return narrow.program(row_format, tuning_for(row_format, choice.heads))


def _launch(program: Program, shape: Shape, operands: Mapping[str, Array]) -> tuple[Array, Array]:
    """out [splits, n, h, 512] and lse [splits, n, h]."""
    tiles = -(-shape.heads // program.heads)
    parts = (shape.splits, shape.n, shape.heads)
    results = launch(
        program,
        shape,
        operands,
        {
            "out": jax.ShapeDtypeStruct(
                (*parts, RANK), jnp.bfloat16 if shape.final else jnp.float32
            ),
            "lse": jax.ShapeDtypeStruct(parts, jnp.float32),
        },
        blocks=shape.n * tiles * shape.splits,
    )
    return results["out"], results["lse"]
