"""The benchmark of a decode step on a tiny case, timed by the host's clock."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import ops
from benchmarks.decode_step import Case
from tests.benchmarks.test_sparse_decode import KEYS, TIMER

TINY = Case(b=2, s_kv=128, heads=2, index_heads=2, topk=9)


def test_the_command_writes_what_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ops, "STEP_CASES", {TINY.name: TINY})
    monkeypatch.setattr(command, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(command, "MATMUL_SIZE", 64)
    monkeypatch.setattr(command, "TIMERS", {"wall": lambda: TIMER})
    path = tmp_path / "results.jsonl"
    arguments = f"decode_step --timer wall --implementation xla --no-peer --out {path}"
    assert command.main(arguments.split()) == 0
    line = json.loads(path.read_text())
    assert set(line) >= KEYS
    assert line["error"] < 1e-2
    assert line["bytes"] == 2 * (128 * 132 + 9 * 656)
    assert "speedup" in capsys.readouterr().out
