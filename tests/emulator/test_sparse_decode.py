"""The blocks of sparse decode against f64, without a GPU: every kind, for every form of rows."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jmla.layouts import Rows
from tests.attention.cases import INT_MAX, INT_MIN, SCALE, random_indices, random_queries, same_bits
from tests.attention.exact import (
    BF16,
    FP32,
    PACKED_FP32,
    PAGED_V4,
    POW2,
    V4,
    Format,
    assert_exact,
    exact_decode,
    exact_tops,
    poison_all,
    relative_error,
    rows_of,
)
from tests.emulator.conflicts import BankConflicts
from tests.emulator.decode import PROGRAMS, Program, decode
from tests.emulator.kernels import kernels
from tests.helpers import assert_close

every_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
READERS = ("load_keys", "load_values")
# The smallest narrow block of each form, and the wide one.
_PLAIN = {
    name: each
    for name, each in PROGRAMS.items()
    if name.split()[0] not in ("fp8", "packed", "paged")
}
# Without those that differ in where their rows come from alone.
every_plain_program = pytest.mark.parametrize("program", _PLAIN.values(), ids=_PLAIN)
_FEW = {name: each for name, each in PROGRAMS.items() if each.wide or each.heads == 16}
one_of_each_kind = pytest.mark.parametrize("program", _FEW.values(), ids=_FEW)
# One key's logit shows the rounding of fp32 scales to two f16.
SINGLE_KEY_LSE = 2e-3


def lse_tolerance(form: Format) -> float:
    return SINGLE_KEY_LSE if form in (FP32, PACKED_FP32) else 1e-5


def queries(seed: int, n: int, heads: int, rows: Rows) -> Any:
    return random_queries(seed, n, 1, heads, width=rows.width)


@every_program
def test_lists_that_fill_the_stages_more_than_twice(program: Program):
    """By two blocks of heads, of which the second is not full."""
    topk = 2 * program.ring + 64 + 51
    indices = random_indices(2, 1, 1, topk, slots=337)
    rows = poison_all(rows_of(program.form, 1, 337), indices)
    q = queries(0, 1, program.heads + 3, rows)
    ours = decode(q, rows, indices, kind=program.kind)
    # The rounding of bf16 weights adds to that of the output.
    error = 2.6e-3 if program.form is BF16 else 2.3e-3
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert_exact(ours, exact, out_error=error)


@every_program
def test_lengths_and_sinks(program: Program):
    """Of no key, of all kinds of lengths, and of slots that do not exist."""
    lengths = np.array([70, 0, 1, 64, 65, INT_MAX, -5, INT_MIN], np.int32)
    indices = random_indices(2, 8, 1, 70, slots=90)
    indices = indices.at[0].set(jnp.array([-1, INT_MIN, 90, INT_MAX, 91])[jnp.arange(70) % 5])
    used = np.where(np.arange(70) < lengths[:, None, None], np.asarray(indices), -1)
    rows = poison_all(rows_of(program.form, 1, 90), used)
    heads = program.heads - 5
    sink = np.linspace(-3, 9, heads).astype(np.float32)
    sink[::5], sink[1::5] = np.inf, -np.inf
    q = queries(0, 8, heads, rows)
    ours = decode(q, rows, indices, kind=program.kind, topk_length=lengths, attn_sink=sink)
    exact = exact_decode(q, [(rows, indices, lengths)], sm_scale=SCALE, attn_sink=sink)
    assert_exact(ours, exact, lse_abs=lse_tolerance(program.form))
    assert not np.asarray(ours[0], np.float32)[:, :, ::5].any()
    assert np.isneginf(ours[1][[0, 1, 6, 7]]).all()


@every_program
def test_parts_of_the_keys(program: Program):
    """Among them parts without a key."""
    indices, lengths = random_indices(2, 2, 1, 200, slots=90), np.array([199, 3])
    rows = poison_all(rows_of(program.form, 1, 90), indices)
    heads = 33 if program.wide else 9
    q, sink = queries(0, 2, heads, rows), np.linspace(-2, 2, heads, dtype=np.float32)
    ours = decode(
        q, rows, indices, kind=program.kind, num_splits=3, topk_length=lengths, attn_sink=sink
    )
    exact = exact_decode(q, [(rows, indices, lengths)], sm_scale=SCALE, attn_sink=sink)
    assert_exact(ours, exact, lse_abs=lse_tolerance(program.form))


@every_plain_program
def test_references_that_rise_again_and_again(program: Program):
    """Keys in the order of their logits, over 200 powers of two; the reverse for some heads."""
    count = 300
    rows = rows_of(program.form, 1, count)
    q = np.tile(np.asarray(queries(0, 1, 1, rows), np.float32), (1, 1, program.heads, 1))
    q *= 25 * np.where(np.arange(program.heads) % 3 == 1, -1, 1)[:, None]
    q[..., :64] += np.asarray(queries(1, 1, program.heads, rows), np.float32)[..., :64]
    q = q.astype(jnp.bfloat16)
    single = np.arange(count, dtype=np.int32)[:, None, None]
    logits = exact_decode(
        np.tile(q[:, :, :1], (count, 1, 1, 1)), [(rows, single, None)], sm_scale=SCALE
    )
    order = np.argsort(logits[1][:, 0, 0])
    assert np.ptp(logits[1]) > 150
    indices = order[None, None].astype(np.int32)
    out, lse = decode(q, rows, indices, kind=program.kind)
    exact_out, exact_lse = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    # Few keys have all the weight, and the rounding of theirs does not average out.
    assert relative_error(np.asarray(out, np.float64), exact_out) <= 3.5e-3
    assert_close(lse, exact_lse, abs_tol=1e-3, rel_tol=8.01 / 65536)


@every_program
def test_nan_in_a_named_row_reaches_its_results_alone(program: Program):
    indices = jnp.stack([jnp.arange(70), jnp.arange(70, 140)])[:, None].astype(jnp.int32)
    rows = poison_all(rows_of(program.form, 1, 140), np.delete(np.arange(140), 66))
    out, lse = decode(queries(0, 2, program.heads - 1, rows), rows, indices, kind=program.kind)
    assert np.isnan(np.asarray(out[0], np.float32)).all() and np.isnan(lse[0]).all()
    assert np.isfinite(np.asarray(out[1], np.float32)).all() and np.isfinite(lse[1]).all()


@pytest.mark.parametrize("name", ["pow2 wide", "fp32 wide", "packed pow2 wide"])
@pytest.mark.parametrize("splits", [1, 2])
def test_pairs_of_blocks(name: str, splits: int, monkeypatch: pytest.MonkeyPatch):
    """That convert half of the rows each: lists of all kinds of lengths, in another order each."""
    form, lengths = PROGRAMS[name].form, np.array([5 * 64 + 1, 0, 64, 131])
    indices = random_indices(2, 4, 1, 350, slots=150, bad=0.1)
    rows = poison_all(rows_of(form, 1, 150), indices)
    q, sink = queries(0, 4, 101, rows), np.linspace(-3, 9, 101, dtype=np.float32)
    monkeypatch.setattr(kernels().launcher, "seed", splits)
    ours = decode(
        q, rows, indices, kind=(True, 64), num_splits=splits, topk_length=lengths, attn_sink=sink
    )
    exact = exact_decode(q, [(rows, indices, lengths)], sm_scale=SCALE, attn_sink=sink)
    assert_exact(ours, exact, lse_abs=lse_tolerance(form))
    # The same blocks of keys, by blocks that share nothing.
    alone = decode(
        q[:, :, :64],
        rows,
        indices,
        kind=(True, 64),
        num_splits=splits,
        topk_length=lengths,
        attn_sink=sink[:64],
    )
    for one, both in zip(alone, ours, strict=True):
        same_bits(one, both[:, :, :64])


@pytest.mark.parametrize("name", sorted({"fp4 64", "v4 64"} | set(_PLAIN) & set(_FEW)))
@pytest.mark.parametrize("splits", [1, 2])
def test_largest_logits(name: str, splits: int):
    """Of lists that end in different parts, or hold nothing."""
    program = PROGRAMS[name]
    indices = random_indices(2, 3, 1, 150, slots=200).at[2].set(-1)
    rows, lengths = poison_all(rows_of(program.form, 1, 200), indices), np.array([150, 40, 150])
    q = queries(0, 3, program.heads, rows)
    *ours, top = decode(
        q,
        rows,
        indices,
        kind=program.kind,
        num_splits=splits,
        topk_length=lengths,
        with_max_logits=True,
    )
    assert_exact(tuple(ours), exact_decode(q, [(rows, indices, lengths)], sm_scale=SCALE))
    wanted = exact_tops(q, rows, indices, lengths, sm_scale=SCALE)
    tolerance = SINGLE_KEY_LSE if program.form is FP32 else 1e-5
    assert_close(top, wanted, abs_tol=tolerance, rel_tol=8.01 / 65536)


@one_of_each_kind
@pytest.mark.parametrize("topk", [1, 63, 64, 65, 128, 129])
def test_lists_around_blocks_of_keys(program: Program, topk: int):
    indices = random_indices(topk, 1, 1, topk, slots=90, bad=0.1)
    rows = poison_all(rows_of(program.form, 1, 90), indices)
    q = queries(0, 1, 7, rows)
    ours = decode(q, rows, indices, kind=program.kind)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert_exact(ours, exact, lse_abs=lse_tolerance(program.form))


@one_of_each_kind
def test_rows_of_a_fresh_cache(program: Program):
    """Rows whose bytes are all zero have logits of 0, and count."""
    if program.form is PAGED_V4:
        pytest.skip("rows taken from pages stand alone; the bytes are those of the form apart")
    rows = rows_of(program.form, 1, 100)
    written = jnp.where(jnp.arange(100) % 3 == 0, jnp.arange(100), -1).astype(jnp.int32)
    rows = rows.gather(written)
    indices = jnp.arange(100, dtype=jnp.int32)[None, None]
    q = queries(0, 1, 12, rows)
    ours = decode(q, rows, indices, kind=program.kind)
    exact = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert_exact(ours, exact, lse_abs=lse_tolerance(program.form))


@one_of_each_kind
def test_rows_and_their_blocks_far_apart(program: Program):
    """Rows, and parts of one row, whose scales differ by powers of ten."""
    rng = np.random.default_rng(3)
    layout, options = program.form
    columns = 128 if "scale_format" in options else 64
    width = layout.default_rank + 64
    blocks = np.repeat(10.0 ** rng.uniform(-2, 1, (150, 9)), columns, axis=1)[:, :width]
    factors = blocks * 10.0 ** rng.uniform(-2, 0, (150, 1))
    rows = rows_of(program.form, 1, 150, factors=factors.astype(np.float32))
    indices = random_indices(2, 1, 1, 150, slots=150)
    q = queries(0, 1, 16, rows)
    out, lse = decode(q, rows, indices, kind=program.kind)
    exact_out, exact_lse = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    assert relative_error(np.asarray(out, np.float64), exact_out) <= 2.5e-3
    lse_abs = 4e-3 if program.form in (FP32, PACKED_FP32) else 1e-5
    assert_close(lse, exact_lse, abs_tol=lse_abs, rel_tol=8.01 / 65536)


@pytest.mark.parametrize(("nope", "rope"), [(1e-3, 300.0), (100.0, 1e-2), (0.0, 50.0)])
def test_v4_rows_whose_rotary_values_are_the_largest(nope: float, rope: float):
    """Or the smallest."""
    factors = np.concatenate([np.full((90, 448), nope), np.full((90, 64), rope)], axis=1)
    rows = rows_of(V4, 1, 90, factors=factors.astype(np.float32))
    q, indices = queries(0, 1, 16, rows), random_indices(2, 1, 1, 70, slots=90)
    q = q * jnp.bfloat16(0.01)
    out, lse = decode(q, rows, indices)
    exact_out, exact_lse = exact_decode(q, [(rows, indices, None)], sm_scale=SCALE)
    for part in (np.s_[..., :448], np.s_[..., 448:]):
        assert relative_error(np.asarray(out, np.float64)[part], exact_out[part]) <= 2.5e-3
    assert_close(lse, exact_lse, abs_tol=1e-5, rel_tol=8.01 / 65536)


@pytest.mark.parametrize("heads", [16, 40])
def test_a_second_cache_in_another_layout(heads: int):
    """In blocks that the kernel chooses itself."""
    indices, more = random_indices(2, 2, 1, 70, slots=90), random_indices(3, 2, 1, 140, slots=80)
    indices = indices.at[0].set(-1)
    rows, extra = poison_all(rows_of(POW2, 1, 90), indices), rows_of(BF16, 4, 80)
    q, lengths = queries(0, 2, heads, rows), np.array([130, 0])
    ours = decode(q, rows, indices, extra=(extra, more, lengths), num_splits=None)
    caches = [(rows, indices, None), (extra, more, lengths)]
    assert_exact(ours, exact_decode(q, caches, sm_scale=SCALE))


@pytest.mark.parametrize("name", ["bf16 32", "pow2 wide"])
def test_bits_do_not_depend_on_the_order_of_the_warpgroups(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    program = PROGRAMS[name]
    rows, indices = rows_of(program.form, 1, 90), random_indices(2, 1, 1, 300, slots=90)
    q = queries(0, 1, program.heads, rows)
    first = decode(q, rows, indices, kind=program.kind)
    for seed in range(1, 6):
        monkeypatch.setattr(kernels().launcher, "seed", seed)
        same_bits(decode(q, rows, indices, kind=program.kind), first)


@every_plain_program
def test_rows_are_read_without_bank_conflicts(program: Program, monkeypatch: pytest.MonkeyPatch):
    """As the operands of both products, of which narrow blocks read both as words."""
    conflicts = BankConflicts()
    monkeypatch.setattr(kernels().launcher, "watchers", [conflicts])
    rows, indices = rows_of(program.form, 1, 90), random_indices(2, 1, 1, 70, slots=90)
    decode(queries(0, 1, program.heads, rows), rows, indices, kind=program.kind)
    ways = {name: worst for name, worst in conflicts.ways.items() if name in READERS}
    assert ways == dict.fromkeys([] if program.wide else READERS, 1)
