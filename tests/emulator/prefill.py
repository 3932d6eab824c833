"""Sparse prefill by emulated blocks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jmla.layouts import BF16Rows, Rows
from tests.attention.cases import SCALE
from tests.emulator.kernels import kernels


def prefill(
    q: Any, rows: Rows, indices: Any, *, topk_length: Any = None, attn_sink: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out [n, h, 512], max_logits and lse [n, h] of the kernel's own blocks."""
    call = kernels().modules["sparse_prefill.call"]
    assert isinstance(rows, BF16Rows)
    keys = call.KeyList(
        format="bf16",
        arrays={"latents": np.asarray(rows.flat().latents)},
        indices=np.asarray(indices),
        lengths=None if topk_length is None else np.asarray(topk_length, np.int32),
    )
    return call.sparse_prefill(np.asarray(q), keys, sm_scale=SCALE, attn_sink=attn_sink)


@contextlib.contextmanager
def blocks_that_run_at_once(count: int) -> Iterator[None]:
    """Within, a launch has so many blocks at most, and every list goes to the kernel's own."""
    modules = kernels().modules
    with pytest.MonkeyPatch.context() as patch:
        for name in ("block", "scores"):
            patch.setattr(modules[f"sparse_prefill.{name}"], "SLOTS", count)
        patch.setattr(modules["sparse_prefill.call"], "is_for_own_blocks", lambda *_: True)
        yield
