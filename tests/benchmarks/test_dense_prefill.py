"""The benchmark of dense prefill on a tiny chunk, timed by the host's clock."""

from collections.abc import Iterator

import jax
import pytest

from benchmarks import __main__ as command
from benchmarks import dense_prefill, records
from benchmarks.dense_prefill import CASES, Bench, Case
from benchmarks.floors import Ceilings
from benchmarks.timing import WallTimer

CEILINGS = Ceilings(copy_gbps=4000.0, matmul_tflops=700.0)
ENVIRONMENT = records.Environment("2026-01-02T03:04:05+00:00", "NVIDIA H200", "jax 1", "abc")
BENCH = Bench(WallTimer(warmup=1, calls=2, cooldown_s=0.0), CEILINGS, ENVIRONMENT, "xla", "xla")
TINY = Case(128, 2)


@pytest.fixture(autouse=True)
def as_by_default() -> Iterator[None]:
    """JAX's own attention relies on promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_both_ways_give_the_same():
    failures: list[str] = []
    (record,) = BENCH.run([TINY], failed=lambda name, _: failures.append(name))
    assert not failures and record.case == "tokens=128 h=2"
    assert 0.0 < record.difference < 5e-2
    assert record.flops == 2 * (128 * 129 // 2) * 2 * (576 + 512)
    assert record.absorbed_us > 0 and record.decompressed_us > 0
    assert dense_prefill.table([record]).row_count == 1
    assert '"gpu": "NVIDIA H200"' in record.to_json()


def test_results_that_differ_are_no_record(monkeypatch: pytest.MonkeyPatch):
    over_heads = dense_prefill._over_heads
    monkeypatch.setattr(dense_prefill, "_over_heads", lambda *a: 1.1 * over_heads(*a))
    reasons: list[str] = []
    assert not list(BENCH.run([TINY], failed=lambda _, error: reasons.append(str(error))))
    assert "difference" in reasons[0]


def test_cases_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    assert CASES[0].name == "t512-h128"
    assert command.main(["dense_prefill", "--cases=t3"]) == 2
    assert "--cases" in capsys.readouterr().err
