"""Dense decode by emulated blocks, as the tests of a GPU call it."""

from typing import Any

import numpy as np

from jmla import _mosaic_decode as mosaic
from jmla.layouts import Rows
from tests.attention.cases import SCALE
from tests.emulator.kernels import kernels


def dense_decode(
    q: Any,
    rows: Rows,
    table: Any,
    seq_lens: Any,
    *,
    kind: tuple[bool, int] | None = None,
    causal: bool = True,
    window: int | None = None,
    num_splits: int | None = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """out [b, s_q, h, 512] and lse [b, s_q, h].

    Args:
        q: bf16 [b, s_q, h, width].
        rows: the cache, of token shape (pages, page_size).
        table: int32 [b, max_pages].
        seq_lens: int32 [b].
        kind: whether blocks are wide, and their heads; None leaves it to the kernel.
        causal: see `jmla.dense_decode`.
        window: likewise.
        num_splits: parts of the positions; None leaves it to the kernel.
    """
    modules = kernels().modules
    call = modules["dense_decode.call"]
    cache = rows.flat()
    pages = call.Pages(
        format=mosaic.format_name(cache),
        arrays={name: np.asarray(x) for name, x in mosaic.arrays_of(cache).items()},
        table=np.asarray(table, np.int32),
        lengths=np.asarray(seq_lens, np.int32),
        page_size=rows.shape[1],
    )
    chosen = call.choose
    if kind is not None:

        def choose(*arguments: Any, **options: Any) -> Any:
            splits = chosen(*arguments, **options).splits
            return modules["sparse_decode.tuning"].Choice(*kind, splits)

        call.choose = choose
    try:
        return call.dense_decode(
            np.asarray(q),
            pages,
            sm_scale=SCALE,
            causal=causal,
            window=window,
            num_splits=num_splits,
        )
    finally:
        call.choose = chosen
