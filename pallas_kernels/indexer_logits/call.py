"""The launch."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.indexer_logits.block import Block, shared_bytes
from pallas_kernels.indexer_logits.copier import copier
from pallas_kernels.indexer_logits.scorer import scorer
from pallas_kernels.indexer_logits.shape import Shape
from pallas_kernels.indexer_logits.tuning import (
    COPIER_REGISTERS,
    Tuning,
    choose,
)
from pallas_kernels.sparse_decode.program import Program, launch


def indexer_logits(
    shape: Shape, operands: Mapping[str, Array], *, tuning: Tuning | None = None
) -> Float[Array, "queries columns"]:
    """The logits of all queries, -inf outside of their windows.

    Of a NaN key or scale the logit is NaN. The tensor cores add products of e4m3 with some 13 bits
    below the largest.

    Args:
        shape: of the launch: at least one query, column and page.
        operands: `q`, e4m3 [requests * queries, heads, dim]; `weights`, f32 [.., heads]; `ends`
            and with `has_starts` also `starts`, int32 [requests * queries], any numbers; `keys`,
            e4m3 [.., dim] or u8 [pages, page_bytes]; `scales`, f32, if they are not packed;
            `page_table`, int32 [requests, max_pages], any numbers, if there is one.
        tuning: None chooses by the shape.

    Returns:
        f32 [requests * queries, columns].
    """
    tuning = tuning or choose(shape)
    program = Program(
        shape.heads,
        shared_bytes(tuning),
        functools.partial(_block, tuning),
        [
            (COPIER_REGISTERS, copier),
            *(
                (tuning.scorer_registers, functools.partial(scorer, number=number))
                for number in range(tuning.scorers)
            ),
        ],
    )
    out = jax.ShapeDtypeStruct((shape.requests * shape.queries, shape.columns), jnp.float32)
    return launch(program, shape, operands, {"out": out}, blocks=tuning.blocks(shape))["out"]


def _block(tuning: Tuning, shape: Shape, *rest) -> Block:
    return Block(shape, tuning, *rest)
