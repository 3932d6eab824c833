"""Sparse decode by emulated blocks, as the tests of a GPU call it."""

import contextlib
from typing import Any, NamedTuple

import numpy as np

from jmla import _mosaic_decode as mosaic
from jmla.layouts import PagedV4Rows, Rows
from pallas_kernels.device.formats import FORMATS
from pallas_kernels.device.row_formats import TILE
from pallas_kernels.sparse_decode import tuning
from pallas_kernels.sparse_decode.narrow.block import shared_bytes
from pallas_kernels.sparse_decode.wide.block import STAGES
from tests.attention.cases import SCALE
from tests.attention.exact import (
    BF16,
    FP4,
    FP8,
    FP32,
    PACKED_FP32,
    PACKED_POW2,
    PAGED_V4,
    POW2,
    SCALED_FP8,
    V4,
    Format,
    rows_of,
)
from tests.emulator.kernels import kernels


class Program(NamedTuple):
    """A kind of block for one form of rows.

    Attributes:
        form: of `tests.attention.exact`.
        wide: which kind.
        heads: of a block.
        ring: keys that its stages hold.
    """

    form: Format
    wide: bool
    heads: int
    ring: int

    @property
    def kind(self) -> tuple[bool, int]:
        return self.wide, self.heads


FORMS = {
    "bf16": BF16,
    "fp8": FP8,
    "scaled fp8": SCALED_FP8,
    "pow2": POW2,
    "fp32": FP32,
    "packed pow2": PACKED_POW2,
    "packed fp32": PACKED_FP32,
    "fp4": FP4,
    "v4": V4,
    "paged v4": PAGED_V4,
}


def _programs() -> dict[str, Program]:
    """All that there are, of all forms."""
    found = {}
    for name, form in FORMS.items():
        row_format = FORMATS[mosaic.format_name(rows_of(form, 0, 1))]
        for heads in tuning.HEAD_TILES:
            each = tuning.tuning_for(row_format, heads)
            with contextlib.suppress(ValueError):  # more shared memory than there is
                shared_bytes(row_format, each)
                found[f"{name} {heads}"] = Program(form, False, heads, each.stages * each.rows)
        if tuning.has_wide_blocks(row_format):
            found[f"{name} wide"] = Program(form, True, tuning.WIDE_HEADS, STAGES * TILE)
    return found


PROGRAMS = _programs()


def decode(
    q: Any,
    rows: Rows,
    indices: Any,
    *,
    kind: tuple[bool, int] | None = None,
    num_splits: int | None = 1,
    topk_length: Any = None,
    attn_sink: Any = None,
    extra: tuple[Rows, Any, Any] | None = None,
    with_max_logits: bool = False,
) -> Any:
    """out [n, 1, h, 512], lse and perhaps max_logits [n, 1, h], for a token of each request.

    Args:
        q: bf16 [n, 1, h, width].
        rows: the cache.
        indices: int32 [n, 1, topk].
        kind: whether blocks are wide, and their heads; None leaves it to the kernel.
        num_splits: parts of the keys; None leaves it to the kernel.
        topk_length: int32 [n] or None.
        attn_sink: f32 [h] or None.
        extra: a second cache, its indices and lengths.
        with_max_logits: whether the largest logits are returned, too.
    """
    modules = kernels().modules
    call = modules["sparse_decode.call"]
    caches = [(rows, indices, topk_length), *([extra] if extra else [])]
    lists = [
        call.KeyList(
            format=mosaic.format_name(cache),
            arrays={name: np.asarray(x) for name, x in mosaic.arrays_of(cache.flat()).items()},
            indices=np.asarray(slots)[:, 0],
            lengths=None if lengths is None else np.asarray(lengths, np.int32),
            page_size=cache.page_size if isinstance(cache, PagedV4Rows) else None,
        )
        for cache, slots, lengths in caches
    ]
    chosen = call.choose
    if kind is not None:

        def choose(row_format: Any, n: int, heads: int, topk: int, splits: int | None) -> Any:
            splits = chosen(row_format, n, heads, topk, splits).splits
            return modules["sparse_decode.tuning"].Choice(*kind, splits)

        call.choose = choose
    try:
        results = call.sparse_decode(
            np.asarray(q)[:, 0],
            lists,
            sm_scale=SCALE,
            attn_sink=attn_sink,
            num_splits=num_splits,
            with_max_logits=with_max_logits,
        )
    finally:
        call.choose = chosen
    return tuple(each[:, None] for each in results if each is not None)
