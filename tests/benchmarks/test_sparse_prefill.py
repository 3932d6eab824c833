"""The benchmark of sparse prefill on tiny cases, timed by the host's clock."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import ops, records
from benchmarks.floors import Ceilings
from benchmarks.sparse_prefill import CASES, Bench, Case, Way, _inputs
from benchmarks.timing import WallTimer

TIMER = WallTimer(warmup=1, calls=2, cooldown_s=0.0)
CEILINGS = Ceilings(copy_gbps=4000.0, matmul_tflops=700.0)
ENVIRONMENT = records.Environment("2026-01-02T03:04:05+00:00", "NVIDIA H200", "jax 1", "abc")
TINY = Case(3, 2, s_kv=128, topk=70)


def test_case_names():
    assert CASES[0].name == "n4096-h128" and CASES[2].name == "n4096-h128-s_kv131072"
    assert Case(4, 2, topk=7, clustered=True).name == "n4-h2-topk7-clustered"
    assert TINY.describe("bf16") == "layout=bf16 n=3 h=2 s_kv=128 topk=70"


def test_a_tiny_case():
    bench = Bench(TIMER, CEILINGS, ENVIRONMENT, "xla", with_peer=False)
    failures: list[str] = []
    ways: tuple[Way, ...] = ("direct", "gather")
    records = bench.run([TINY], ["bf16", "656"], ways, failed=lambda name, _: failures.append(name))
    record, *of_656 = records
    assert [each.implementation for each in of_656] == ["xla, direct", "xla, gather"]
    assert all(each.error < 6e-3 and each.bytes == 3 * 70 * 656 for each in of_656)
    assert not failures and record.op == "sparse_prefill"
    assert record.bytes == 3 * 70 * 1152 and 0 < record.unique_bytes <= 128 * 1152
    assert record.flops == 2 * 3 * 70 * 2 * (576 + 512)
    assert 0.0 < record.error < 4e-3 and record.lse_error < 1e-4
    assert record.ours_us > 0 and record.peer_us is None


def test_clustered_queries_share_most_of_their_rows():
    _, slots = _inputs(Case(128, 1, s_kv=1 << 20, topk=500, clustered=True), 576, 0)
    same = np.asarray(slots[1:]) == np.asarray(slots[:-1])
    assert same[:63].mean() > 0.7 and same[63].mean() < 0.1
    _, slots = _inputs(Case(128, 1, s_kv=1 << 20, topk=500), 576, 0)
    assert (np.asarray(slots[1:]) == np.asarray(slots[:-1])).mean() < 0.1


@pytest.mark.parametrize("option", ["--cases=n3", "--layouts=656-packed"])
def test_unknown_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(["sparse_prefill", "--no-peer", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_the_command_writes_what_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ops, "PREFILL_CASES", {TINY.name: TINY})
    monkeypatch.setattr(command, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(command, "MATMUL_SIZE", 64)
    monkeypatch.setattr(command, "TIMERS", {"wall": lambda: TIMER})
    path = tmp_path / "results.jsonl"
    arguments = f"sparse_prefill --timer wall --implementation xla --no-peer --out {path}"
    assert command.main(arguments.split()) == 0
    assert json.loads(path.read_text())["op"] == "sparse_prefill"
    assert "speedup" in capsys.readouterr().out
