"""The launches of a call."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.row_formats import RANK, RowFormat
from pallas_kernels.sparse_decode import narrow, wide
from pallas_kernels.sparse_decode.join import join
from pallas_kernels.sparse_decode.program import Program, launch
from pallas_kernels.sparse_decode.task import KeySource
from pallas_kernels.sparse_decode.tuning import Choice, Shape, Tuning, choose, tuning_for


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


class Results(NamedTuple):
    """Of `n` queries.

    Attributes:
        out: bf16 [n, h, 512].
        lse: f32 [n, h], natural and without the sink.
        max_logits: f32 [n, h], -inf for a query that attends to nothing, or None.
    """

    out: BFloat16[Array, "n h 512"]
    lse: Float[Array, "n h"]
    max_logits: Float[Array, "n h"] | None


def sparse_decode(
    q: BFloat16[Array, "n h width"],
    lists: Sequence[KeyList],
    *,
    sm_scale: float | Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
    num_splits: int | None,
    with_max_logits: bool = False,
) -> Results:
    """Attention of `n` queries to the keys of all lists.

    Args:
        q: bf16 [n, h, width], of the lists' formats; n and h at least 1.
        lists: one or more.
        sm_scale: factor on the logits.
        attn_sink: f32 [h], the logit of a key of value zero, or None.
        num_splits: parts of each list; None chooses by the shapes.
        with_max_logits: whether each head's largest logit is among the results.
    """
    n, heads, _ = q.shape
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    choices = [
        choose(FORMATS[each.format], n, heads, each.indices.shape[1], num_splits) for each in lists
    ]
    final = len(lists) == 1 and choices[0].splits == 1
    results = []
    for each, choice in zip(lists, choices, strict=True):
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
            has_max_logits=with_max_logits,
            pages=each.pages,
        )
        operands = {"q": q, "indices": each.indices, "sm_scale": scale, **each.arrays}
        if "scale" in operands:
            operands["scale"] = operands["scale"].reshape(1)
        if each.lengths is not None:
            operands["lengths"] = each.lengths
        if shape.has_sink and attn_sink is not None:
            operands["sink"] = attn_sink
        program = program_for(FORMATS[each.format], choice, heads)
        results.append(launch_parts(program, shape, operands))
    top = None
    if with_max_logits:
        tops = [part for each in results for part in each["max_logits"]]
        top = functools.reduce(jnp.maximum, tops)
    if final:
        return Results(results[0]["out"][0], results[0]["lse"][0], top)
    return Results(*join([(each["out"], each["lse"]) for each in results], attn_sink), top)


def program_for(
    row_format: RowFormat,
    choice: Choice,
    heads: int,
    keys: KeySource | None = None,
    tuned: Callable[[RowFormat, int], Tuning] = tuning_for,
) -> Program:
    """The chosen kind of block for queries of some heads; without `keys`, a list for each query."""
    if choice.wide:
        return wide.program(row_format, heads, keys)
    return narrow.program(row_format, tuned(row_format, choice.heads), keys)


def launch_parts(program: Program, shape: Shape, operands: Mapping[str, Array]) -> dict[str, Array]:
    """out [splits, n, h, 512], lse and perhaps max_logits [splits, n, h]."""
    tiles = -(-shape.heads // program.heads)
    parts = (shape.splits, shape.n, shape.heads)
    dtype = jnp.bfloat16 if shape.final else jnp.float32
    results = {
        "out": jax.ShapeDtypeStruct((*parts, RANK), dtype),
        "lse": jax.ShapeDtypeStruct(parts, jnp.float32),
    }
    if shape.has_max_logits:
        results["max_logits"] = jax.ShapeDtypeStruct(parts, jnp.float32)
    return launch(program, shape, operands, results, blocks=shape.n * tiles * shape.splits)
