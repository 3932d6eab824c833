"""The two launches."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.indexer_logits import Shape
from pallas_kernels.indexer_logits.block import Block, shared_bytes
from pallas_kernels.indexer_logits.copier import copier
from pallas_kernels.indexer_logits.scorer import scorer
from pallas_kernels.indexer_logits.tuning import (
    CHOOSER_REGISTERS,
    COPIER_REGISTERS,
    MULTIPROCESSORS,
    Tuning,
    choose,
)
from pallas_kernels.indexer_topk.join import join_row, shared_words
from pallas_kernels.indexer_topk.keep import keep
from pallas_kernels.indexer_topk.shape import CAPACITY, CHOOSERS, HANDED_ON, PAIR, Kept
from pallas_kernels.select_topk.block import BINS, HEADER
from pallas_kernels.select_topk.launch import launch_rows
from pallas_kernels.select_topk.shape import PagedSlots
from pallas_kernels.select_topk.shape import Shape as TopkShape
from pallas_kernels.sparse_decode.program import Program, launch

_THREADS = 1024  # of a block that joins lists
_PAYS = 40000  # keys of a row that a block scores


def pays(shape: Shape) -> bool:
    """Whether this takes less time than logits in memory and a selection from them.

    It does where a block has so many keys of a row that most need not be kept: on an H200 from some
    40000 on, if windows are about as long as the columns.
    """
    keys = min(shape.columns, shape.requests * shape.columns // MULTIPROCESSORS)
    fits = (shape.requests + MULTIPROCESSORS) * CAPACITY < 1 << 31
    return shape.queries == 1 and not shape.has_starts and fits and keys >= _PAYS


def indexer_topk(
    shape: Shape,
    operands: Mapping[str, Array],
    k: int,
    *,
    conversion: PagedSlots | None = None,
    tuning: Tuning | None = None,
) -> Int32[Array, "requests k"]:
    """The positions of the k largest logits of each request, ascending, or their slots.

    As `indexer_logits` and `select_topk` one after the other: the logits have the same bits.

    Args:
        shape: of the logits: one query of each request, whose window begins at its first key.
        operands: as of `indexer_logits`.
        k: as of `select_topk`.
        conversion: to slots by the page table of the operands; None leaves positions.
        tuning: of the logits; None chooses by the shape.

    Returns:
        int32 [requests, k]; -1 after the last.
    """
    shape = dataclasses.replace(shape, longer_than=k)
    tuning = tuning or choose(shape)
    # What is kept takes the room of a stage.
    tuning = dataclasses.replace(
        tuning, stages=tuning.stages - 1, handed_on=HANDED_ON, choosers=CHOOSERS
    )
    kept = Kept(shape.requests, tuning.blocks(shape), k)
    program = Program(
        shape.heads,
        {
            **shared_bytes(tuning),
            "header": 4 * HEADER,
            "histogram": 4 * BINS,
            "kept": PAIR * CAPACITY,
        },
        functools.partial(_block, tuning),
        [
            (COPIER_REGISTERS, copier),
            *(
                (CHOOSER_REGISTERS, functools.partial(keep, k=k, number=number))
                for number in range(CHOOSERS)
            ),
            *(
                (tuning.scorer_registers, functools.partial(scorer, number=number))
                for number in range(tuning.scorers)
            ),
        ],
    )
    results = {
        "pairs": jax.ShapeDtypeStruct((kept.lists, CAPACITY, 2), jnp.int32),
        "counts": jax.ShapeDtypeStruct((kept.lists,), jnp.int32),
        "first": jax.ShapeDtypeStruct((kept.rows,), jnp.int32),
        "last": jax.ShapeDtypeStruct((kept.rows,), jnp.int32),
    }
    made = launch(program, shape, operands, results, blocks=kept.blocks)
    rows = TopkShape(shape.requests, shape.columns, k, False, conversion)
    given = {"lengths": operands["ends"], **made}
    if conversion is not None:
        given["page_table"] = operands["page_table"]
    return launch_rows(
        rows,
        given,
        shared_words(rows, kept, _THREADS),
        functools.partial(join_row, kept),
        threads=_THREADS,
    )


def _block(tuning: Tuning, shape: Shape, *rest) -> Block:
    return Block(shape, tuning, *rest)
