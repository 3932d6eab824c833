"""The benchmark of dense decode on tiny cases, timed by the host's clock."""

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import records
from benchmarks.dense_decode import CASES, Bench, Case, Sizes, _slots
from benchmarks.floors import Ceilings
from benchmarks.timing import WallTimer

TIMER = WallTimer(warmup=1, calls=2, cooldown_s=0.0)
CEILINGS = Ceilings(copy_gbps=4000.0, matmul_tflops=700.0)
ENVIRONMENT = records.Environment("2026-01-02T03:04:05+00:00", "NVIDIA H200", "jax 1", "abc")
TINY = Case(3, 2, 130, s_q=2, uneven=True)


def test_case_names():
    assert CASES[0].name == "b128-h128-s_kv4096"
    assert TINY.name == "b3-s_q2-h2-s_kv130-uneven"
    assert TINY.describe("fp4") == "layout=fp4 b=3 h=2 s_q=2 s_kv=130"


def test_slots_follow_the_pages():
    table = np.array([[5, 2], [0, 7]])
    assert _slots(table, np.array([65, 1])).tolist() == [*range(320, 384), 128, 0]


@pytest.mark.parametrize("layout", ["bf16", "fp4"])
def test_a_tiny_case(layout: str):
    """Its exact results are those of the tokens that see less, too."""
    sizes = Sizes(slots=1024, rotated_bytes=1, checked=6)
    bench = Bench(TIMER, CEILINGS, ENVIRONMENT, "xla", with_peer=False, sizes=sizes)
    failures: list[str] = []
    (record,) = bench.run([TINY], [layout], failed=lambda name, _: failures.append(name))
    rows = int(TINY.lengths().sum())
    assert not failures and record.op == "dense_decode"
    assert record.bytes == rows * {"bf16": 1152, "fp4": 324}[layout] == record.unique_bytes
    assert record.flops == 2 * rows * 2 * 2 * (576 + 512)
    assert 0.0 < record.error < 4e-3 and record.lse_error < 1e-4
    assert record.ours_us > 0 and record.peer_us is None


@pytest.mark.parametrize("option", ["--cases=n3", "--layouts=656-packed"])
def test_unknown_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(["dense_decode", "--no-peer", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err
