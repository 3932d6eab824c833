"""The benchmark of index logits on tiny cases, timed by the host's clock."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import indexer_logits, ops
from benchmarks.indexer_logits import CASES, Case
from tests.benchmarks.test_sparse_decode import KEYS, TIMER

TINY = (
    Case(b=2, s_kv=128, heads=2),
    Case(b=2, s_kv=128, heads=2, topk=9, s_q=2),
    Case(b=5, s_kv=64, heads=2, form="ragged"),
)


def test_case_names_are_unique_and_name_what_is_unusual():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {"b64-s_kv32768", "b64-s_kv32768-s_q2", "n4096-s_kv32768"} <= set(names)


def test_work_of_a_prompt_is_what_its_tokens_see():
    case = Case(b=3, s_kv=10, heads=2, form="ragged")
    assert case.pairs == 8 + 9 + 10
    assert case.flops == 2 * 27 * 2 * 128
    assert case.num_bytes == 10 * 132 + 4 * 27


def test_the_command_writes_what_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ops, "LOGITS_CASES", {case.name: case for case in TINY})
    monkeypatch.setattr(command, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(command, "MATMUL_SIZE", 64)
    monkeypatch.setattr(command, "TIMERS", {"wall": lambda: TIMER})
    monkeypatch.setattr(indexer_logits, "POOL_BYTES", 1 << 14)
    path = tmp_path / "results.jsonl"
    arguments = f"indexer_logits --timer wall --implementation xla --no-peer --out {path}"
    assert command.main(arguments.split()) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(line) >= KEYS for line in lines)
    assert [line["error"] < 1e-6 for line in lines] == [True] * 3
    assert lines[0]["case"] == "b=2 s_kv=128 s_q=1 h=2 topk=0"
    assert "speedup" in capsys.readouterr().out


def test_a_missing_peer_is_said_at_once(capsys: pytest.CaptureFixture[str]):
    assert command.main(["indexer_logits", "--timer=wall"]) == 2
    assert "--no-peer" in capsys.readouterr().err
