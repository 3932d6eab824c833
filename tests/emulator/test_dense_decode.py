"""Dense decode against f64, without a GPU: where its keys come from, and which it masks."""

import pytest

from tests.attention.cases import SCALE, random_queries
from tests.attention.exact import (
    BF16,
    assert_exact,
    exact_dense,
    poison_all,
    random_paging,
    rows_of,
)
from tests.emulator.decode import PROGRAMS, Program
from tests.emulator.dense import dense_decode
from tests.emulator.kernels import kernels

# A format each of those that find their rows, and the parts of them, in different ways.
_FEW = ("bf16 16", "bf16 wide", "fp8 wide", "packed pow2 16", "pow2 wide", "fp4 16", "paged v4 16")
one_of_each_kind = pytest.mark.parametrize("name", _FEW)
LENGTHS = [0, 1, 2, 64, 65, 150]


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that runs a block at a time: the longest requests come first."""
    monkeypatch.setattr(kernels().modules["dense_decode.keys"], "SLOTS", 1)


def check(
    program: Program,
    seq_lens: list[int],
    *,
    page_size: int,
    s_q: int = 1,
    heads: int = 3,
    **options,
) -> None:
    paging = random_paging(page_size, page_size, seq_lens)
    rows = poison_all(rows_of(program.form, 1, paging.pages, page_size), paging.slots)
    q = random_queries(0, len(seq_lens), s_q, heads, width=rows.width)
    ours = dense_decode(q, rows, paging.table, seq_lens, kind=program.kind, **options)
    exact = exact_dense(
        q,
        rows,
        paging.slots,
        seq_lens,
        sm_scale=SCALE,
        causal=options.get("causal", True),
        window=options.get("window"),
    )
    lse_abs = 2e-3 if "fp32" in str(program.form) else 1e-5
    error = 2.6e-3 if program.form is BF16 else 2.3e-3
    assert_exact(ours, exact, lse_abs=lse_abs, out_error=error)


@one_of_each_kind
def test_tokens_of_a_request_in_one_block(name: str):
    """Each sees less than the next; of pages of a size that divides nothing."""
    check(PROGRAMS[name], LENGTHS, page_size=37, s_q=3)


@pytest.mark.parametrize("name", ["bf16 wide", "pow2 wide", "fp4 16"])
def test_parts(name: str):
    """Of short requests some are empty; blocks have the heads of one token."""
    program = PROGRAMS[name]
    check(program, [0, 3, 150], page_size=64, s_q=2, heads=program.heads, num_splits=3)


def test_tokens_that_see_all_of_the_request():
    check(PROGRAMS["bf16 wide"], [70, 2], page_size=64, s_q=2, heads=5, causal=False)


@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_pages_that_the_copy_engine_brings(page_size: int):
    """But for rows at the end, whose neighbours may hold anything."""
    check(PROGRAMS["bf16 wide"], [15, 16, 0, 64, 300], page_size=page_size, heads=35)


@pytest.mark.parametrize(("name", "s_q"), [("bf16 wide", 3), ("fp4 16", 1)])
def test_a_window(name: str, s_q: int):
    """Longer than a request, within a block of keys, and across some."""
    check(PROGRAMS[name], [3, 64, 200], page_size=16, s_q=s_q, window=70, num_splits=2)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("name", ["bf16 wide", "fp4 16"])
def test_the_longest_request_first(name: str):
    """Some are equally long."""
    check(PROGRAMS[name], [64, 3, 130, 0, 64, 3], page_size=64, num_splits=2)
