"""The call of dense decode's kernel, on any machine: a stand-in takes the kernel's place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import _implementation, _mosaic_decode, _mosaic_dense
from jmla.attention import dense_decode
from tests.attention.cases import SCALE, random_queries, random_rows
from tests.attention.exact import (
    BF16,
    FORMATS,
    FP4,
    FP8,
    PACKED_FP32,
    PACKED_POW2,
    PAGED_V4,
    V4,
    Format,
    random_paging,
    rows_of,
)

kernels = pytest.importorskip("pallas_kernels.dense_decode", reason="needs Pallas for GPUs")
tuning = pytest.importorskip("pallas_kernels.dense_decode.tuning")

EVERY_FORMAT = (*FORMATS, FP8, FP4, V4, PAGED_V4, PACKED_POW2, PACKED_FP32)
NAMES = {_mosaic_decode.format_name(rows_of(form, 0, 1)) for form in EVERY_FORMAT}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What each call that was traced has given to the kernel."""
    traced: list[tuple[Any, ...]] = []

    def recorded(q, pages, *, sm_scale, causal, window, num_splits):
        assert q.dtype == jnp.bfloat16 and pages.format in NAMES
        traced.append(
            (q.shape, pages.format, pages.num_slots, pages.page_size, causal, window, num_splits)
        )
        sums = jnp.sum(pages.table, axis=1) + pages.lengths
        out = jnp.broadcast_to(sums[:, None, None, None], (*q.shape[:3], 512))
        return out.astype(jnp.bfloat16), jnp.zeros(q.shape[:3], jnp.float32)

    monkeypatch.setattr(kernels, "dense_decode", recorded)
    fresh = jax.jit(lambda *args: _mosaic_dense._attend(*args), static_argnums=2)
    monkeypatch.setattr(_mosaic_dense, "_compiled", fresh)
    return traced


def decode(q, rows, table, lengths, **options):
    return dense_decode(
        q, rows, table, lengths, sm_scale=SCALE, implementation="mosaic_gpu", **options
    )


@pytest.mark.parametrize("form", EVERY_FORMAT)
def test_arguments_reach_the_kernel(calls, form: Format):
    rows = rows_of(form, 1, 5, 8)
    table, lengths = jnp.array([[1, 3], [0, 4]], jnp.int32), jnp.array([9, 16], jnp.int32)
    q = random_queries(0, 2, 3, 4, width=rows.width)
    out, lse = decode(q, rows, table, lengths, causal=False, window=7, num_splits=2)
    assert calls == [((2, 3, 4, rows.width), _mosaic_decode.format_name(rows), 40, 8, False, 7, 2)]
    assert out.shape == (2, 3, 4, 512) and lse.shape == (2, 3, 4)
    np.testing.assert_array_equal(np.asarray(out[:, 0, 0, 0], np.float32), [13.0, 20.0])


def test_vmap_over_requests_makes_them_one_batch(calls):
    rows, q = rows_of(BF16, 1, 5, 8), random_queries(0, 3, 2, 1, 4, width=576)
    table = jnp.arange(12, dtype=jnp.int32).reshape(3, 2, 2)
    out, _ = jax.vmap(lambda q, table: decode(q, rows, table, jnp.array([9, 16], jnp.int32)))(
        q, table
    )
    assert [shape for shape, *_ in calls][-1] == (6, 1, 4, 576)
    wanted = np.asarray(table).sum(-1) + np.array([9, 16])
    np.testing.assert_array_equal(np.asarray(out[..., 0, 0, 0], np.float32), wanted)


def test_none_takes_the_kernel_on_hopper_alone(calls, monkeypatch: pytest.MonkeyPatch):
    q, rows = random_queries(0, 1, 1, 2, width=576), rows_of(BF16, 1, 5, 8)
    table, lengths = jnp.array([[1, 3]], jnp.int32), jnp.array([9], jnp.int32)
    for hopper in (False, True):
        monkeypatch.setattr(_implementation, "on_hopper", lambda hopper=hopper: hopper)
        dense_decode(q, rows, table, lengths, sm_scale=SCALE)
        assert bool(calls) == hopper
    dense_decode(q, rows, table, lengths, sm_scale=SCALE, implementation="xla")
    dense_decode(q[..., :192], random_rows(0, 5, 4), table, lengths, sm_scale=SCALE)
    assert len(calls) == 1


def test_a_call_that_it_does_not_serve_says_why():
    table, lengths = jnp.array([[1, 3]], jnp.int32), jnp.array([9], jnp.int32)
    with pytest.raises(NotImplementedError, match="these have 128 \\+ 64"):
        decode(random_queries(0, 1, 1, 2), random_rows(0, 5, 4), table, lengths)
    with pytest.raises(NotImplementedError, match="expects at least one query"):
        decode(random_queries(0, 1, 0, 2, width=576), rows_of(BF16, 0, 5, 4), table, lengths)


def test_any_machine_traces_and_lowers_it():
    paging = random_paging(0, 64, [100, 30])
    rows, q = rows_of(FP8, 0, paging.pages, 64), random_queries(0, 2, 2, 20, width=576)
    arguments = q, rows, jnp.asarray(paging.table), jnp.array([100, 30], jnp.int32)
    out, lse = jax.eval_shape(decode, *arguments)
    assert out.shape == (2, 2, 20, 512) and lse.shape == (2, 2, 20)


class TestChoice:
    """How a launch divides its work."""

    @staticmethod
    def choose(name: str, requests: int, heads: int, longest: int, splits: int | None = None):
        formats = pytest.importorskip("pallas_kernels.sparse_decode").FORMATS
        return tuning.choose(formats[name], requests, heads, longest, 64, splits, masks=False)

    @pytest.mark.parametrize("name", ["bf16", "fp8", "block_scale_pow2", "fp4", "v4"])
    @pytest.mark.parametrize("heads", [16, 33, 128])
    def test_with_splits_given_the_batch_decides_nothing_that_shows_in_bits(
        self, name: str, heads: int
    ):
        choices = [self.choose(name, n, heads, 8192, 3) for n in (1, 16, 128, 5000)]
        assert {(choice.wide, choice.splits) for choice in choices} == {(choices[0].wide, 3)}

    def test_one_request_fills_the_gpu(self):
        assert self.choose("bf16", 1, 128, 131072).splits * 2 > 100
        assert self.choose("bf16", 128, 128, 131072).splits == 1

    def test_there_are_no_more_parts_than_blocks_of_keys(self):
        assert self.choose("bf16", 1, 128, 64).splits == 1
        assert self.choose("bf16", 1, 128, 130, 32).splits == 3
