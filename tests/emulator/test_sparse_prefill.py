"""The blocks of sparse prefill against f64, without a GPU."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention.cases import INT_MAX, INT_MIN, SCALE, random_indices, random_queries, same_bits
from tests.attention.exact import (
    BF16,
    assert_exact_prefill,
    exact_decode,
    poison_all,
    relative_error,
    rows_of,
)
from tests.attention.exact import exact_prefill as exact_in_f64
from tests.emulator.conflicts import BankConflicts
from tests.emulator.kernels import kernels
from tests.emulator.prefill import blocks_that_run_at_once, prefill
from tests.helpers import assert_close

exact_prefill = functools.partial(exact_in_f64, sm_scale=SCALE)


@pytest.fixture(autouse=True)
def two_blocks():
    with blocks_that_run_at_once(2):
        yield


def queries(seed: int, n: int, heads: int) -> Any:
    return random_queries(seed, n, heads, width=576)


def test_more_tasks_than_blocks_and_lists_that_fill_the_stages_more_than_twice():
    """Heads of which the second tile is not full."""
    indices = random_indices(2, 3, 5 * 64 + 51, slots=337)
    rows, q = poison_all(rows_of(BF16, 1, 337), indices), queries(0, 3, 67)
    assert_exact_prefill(prefill(q, rows, indices), exact_prefill(q, rows, indices))


def test_lengths_and_sinks():
    """Tasks of no key between tasks of one stage and of several, for each of both blocks."""
    lengths = [0, 200, 1, INT_MAX, 0, -5, 48, 0, INT_MIN, 0, 49, 100, 0, 0, 199]
    n = len(lengths)
    indices = random_indices(2, n, 200, slots=300)
    used = np.where(np.arange(200) < np.array(lengths)[:, None], np.asarray(indices), -1)
    rows, q = poison_all(rows_of(BF16, 1, 300), used), queries(0, n, 5)
    sink = np.array([0.5, np.inf, -np.inf, 9.0, -3.0], np.float32)
    options: dict[str, Any] = {"topk_length": np.array(lengths, np.int32), "attn_sink": sink}
    ours, exact = prefill(q, rows, indices, **options), exact_prefill(q, rows, indices, **options)
    assert_exact_prefill(ours, exact)
    assert not np.asarray(ours[0], np.float32)[:, 1].any()
    for i in (0, 5, 13):
        assert np.isneginf(ours[1][i]).all() and np.isneginf(ours[2][i]).all()


def test_indices_that_name_no_row():
    rows = poison_all(rows_of(BF16, 1, 8), np.zeros(0, np.int32))
    bad = np.array([-1, INT_MIN, 8, INT_MAX, -123456, 9], np.int32)
    indices = bad[np.arange(3 * 130).reshape(3, 130) % 6]
    out, top, lse = prefill(queries(0, 3, 2), rows, indices)
    assert not np.asarray(out, np.float32).any()
    assert np.isneginf(top).all() and np.isneginf(lse).all()


@pytest.mark.parametrize("topk", [1, 16, 17, 63, 64, 65, 128, 129, 193])
def test_lists_around_stages(topk: int):
    indices = random_indices(topk, 3, topk, slots=90, bad=0.1)
    rows, q = poison_all(rows_of(BF16, 1, 90), indices), queries(0, 3, 7)
    assert_exact_prefill(prefill(q, rows, indices), exact_prefill(q, rows, indices))


def test_references_that_rise_again_and_again():
    """Keys in the order of their logits, over 200 powers of two; the reverse for some heads."""
    rows = rows_of(BF16, 1, 300)
    q = np.tile(np.asarray(queries(0, 1, 1), np.float32), (1, 64, 1))
    q *= 25 * np.where(np.arange(64) % 3 == 1, -1, 1)[:, None]
    q[..., :64] += np.asarray(queries(1, 1, 64), np.float32)[..., :64]
    q = q.astype(jnp.bfloat16)
    single = np.arange(300, dtype=np.int32)[:, None, None]
    one = np.tile(q[:, None, :1], (300, 1, 1, 1))
    _, logits = exact_decode(one, [(rows, single, None)], sm_scale=SCALE)
    assert np.ptp(logits) > 150
    indices = np.argsort(logits[:, 0, 0])[None].astype(np.int32)
    ours, exact = prefill(q, rows, indices), exact_prefill(q, rows, indices)
    # Few keys have all the weight, and the rounding of theirs does not average out.
    assert relative_error(np.asarray(ours[0], np.float64), exact[0]) <= 3.5e-3
    for mine, theirs in zip(ours[1:], exact[1:], strict=True):
        assert_close(mine, theirs, abs_tol=1e-3, rel_tol=8.01 / 65536)


def test_nan_in_a_named_row_reaches_its_results_alone():
    indices = np.stack([np.arange(70), np.arange(70, 140), np.arange(70)]).astype(np.int32)
    rows = poison_all(rows_of(BF16, 1, 140), np.delete(np.arange(140), 76))
    for number, ours in enumerate(prefill(queries(0, 3, 3), rows, indices)):
        nan = np.isnan(np.asarray(ours, np.float32))
        assert nan[1].all() and not nan[[0, 2]].any(), number


def test_bits_do_not_depend_on_the_order_of_the_warpgroups(monkeypatch: pytest.MonkeyPatch):
    rows, indices = rows_of(BF16, 1, 90), random_indices(2, 5, 200, slots=90)
    q, lengths = queries(0, 5, 3), np.array([200, 1, 0, 150, 60], np.int32)
    first = prefill(q, rows, indices, topk_length=lengths)
    for seed in range(1, 6):
        monkeypatch.setattr(kernels().launcher, "seed", seed)
        same_bits(prefill(q, rows, indices, topk_length=lengths), first)


def test_weights_are_stored_without_bank_conflicts(monkeypatch: pytest.MonkeyPatch):
    conflicts = BankConflicts()
    monkeypatch.setattr(kernels().launcher, "watchers", [conflicts])
    rows, indices = rows_of(BF16, 1, 90), random_indices(2, 1, 100, slots=90)
    prefill(queries(0, 1, 64), rows, indices)
    assert conflicts.ways["weigh"] == 1
